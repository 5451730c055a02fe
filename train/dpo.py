"""Direct preference optimisation: of two answers to a prompt, the better one is made likelier.

    python train/dpo.py                                    tiny-llama and tinyworld's pairs, offline
    python train/dpo.py --config train/tiny_dpo.json --checkpoint runs/sft/model      after an SFT
    python train/dpo.py --model gpt2 --beta 0.3 --data pairs.jsonl
    python train/dpo.py --checkpoint runs/sft/model --method full --lr 1e-5

A line of --data has prompt, chosen and rejected. The reference is the model as it begins: with LoRA
switched off, or, for every other method, a frozen copy. Accuracy is how often the better answer
gained more than the worse one since then; the loss begins at ln 2. Source: Rafailov et al. 2023.
"""

import math

import gpt2
import llama
import phi
from minillm import finetune
from minillm.cli import Parser, above_zero, settings_of
from minillm.data.preferences import PairBatches, encode_pairs
from minillm.dpo import DPO, kl_to_reference, preference_report
from minillm.errors import UserError, friendly_errors
from minillm.files import write_json
from minillm.flags import add_flags, parse
from minillm.job import Job, Options
from minillm.memory import peak_mib, reset_peak
from minillm.report import conclude
from minillm.training import train

LR = 1e-3
FAMILIES = {family.name: family for family in (llama.FAMILY, gpt2.FAMILY, phi.FAMILY)}
KL_SAMPLES, KL_TOKENS = 32, 40


def parse_args(argv=None):
    parser = Parser(__doc__)
    targets = {name: ",".join(family.targets) for name, family in FAMILIES.items()}
    parser.add_argument("--model", choices=[*FAMILIES], default="llama", help="kind of model")
    parser.add_argument("--beta", type=above_zero, default=0.1,
        help="strength of the KL penalty: the higher, the closer to the reference")  # fmt: skip
    add_flags(parser, "; ".join(f"{names} for {name}" for name, names in targets.items()), LR)
    parser.set_defaults(task="preferences", batch_size=8, accumulation_steps=1, targets=None,
                        lora_dropout=0.0)  # fmt: skip
    args = parse(parser, argv, LR)
    args.targets = args.targets or targets[args.model]
    if args.task != "preferences":
        raise UserError(f"--task {args.task}: has no pairs; leave it out, give pairs by --data")
    if args.pack:
        raise UserError("--pack: pairs are not packed; leave it out")
    return args


def show_preferences(job: Job, dpo: DPO, held_out: list, seed: int, title: str) -> dict:
    """Prints how the model judges the held-out pairs, and how far it is from its reference."""
    found = preference_report(job.model, dpo, held_out, job.base.precision)
    prompts = job.data.samples[:KL_SAMPLES]
    kl, error = kl_to_reference(job.model, dpo, job.base.tokenizer, prompts, KL_TOKENS, seed)
    shown = "" if error is None else f" +- {error:.2f}"
    print(
        f"{title:>8}: loss {found['loss']:.4f}, accuracy {found['accuracy']:.1%}, margin "
        f"{found['margin']:.3f}, better one likelier {found['likelier']:.1%} of {found['n']} "
        f"pairs; KL to the reference {kl:.2f}{shown} nats an answer (up to {KL_TOKENS} "
        f"tokens of each of {len(prompts)})", flush=True,
    )  # fmt: skip
    return found | {"kl": kl, "kl_error": error, "kl_n": len(prompts), "kl_tokens": KL_TOKENS}


def main(argv=None) -> dict | None:
    args = parse_args(argv)
    rows = 2 * args.batch_size  # two for each pair
    options = Options.from_flags(vars(args) | {"batch_size": rows})
    job, held_out = finetune.prepare(FAMILIES[args.model], options, encode_pairs, PairBatches)
    dpo, precision = DPO(job.model, args.beta), job.base.precision
    run = finetune.begin(job, dpo, options.run, f"dpo-{args.model}", settings_of(args))
    if run is None:  # --dry-run
        return None
    before = show_preferences(job, dpo, held_out, args.seed, "before")
    reset_peak(precision.device)
    settings = options.training
    progress, optimizer = train(job.model, dpo, job.batches, held_out, settings, precision, run)
    peak = peak_mib(precision.device) - job.base.held_before
    finetune.keep(job, run, progress, args.keep_last)
    after = show_preferences(job, dpo, held_out, args.seed, "after")
    both = {"before": before, "after": after, "ln 2": math.log(2)}
    write_json(run.folder / "preferences.json", both)
    print("(memory and FLOPs are those of the model's own pass; the reference adds a forward"
          f"{', and a frozen copy' if dpo.copy is not None else ''})")  # fmt: skip
    conclude(job, run, progress, optimizer, peak)
    return {"before": before, "after": after}


if __name__ == "__main__":
    with friendly_errors():
        main()
