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
from pathlib import Path

import torch

import gpt2
import llama
import phi
from minillm import finetune
from minillm.adapt.methods import MethodOptions, adapt
from minillm.attention import choose_attention
from minillm.cli import Parser, amount, settings_of
from minillm.data.preferences import PairBatches, encode_pairs
from minillm.data.tasks import TASKS
from minillm.data.templates import find_template
from minillm.dpo import DPO, kl_to_reference, preference_report
from minillm.errors import UserError, friendly_errors
from minillm.files import write_json
from minillm.fingerprint import fingerprint
from minillm.flags import add_flags, parse
from minillm.memory import peak_mib, reset_peak
from minillm.precision import choose_device, choose_precision
from minillm.preflight import preflight
from minillm.runs import Run, fresh_folder
from minillm.training import TrainSettings, train

LR = 1e-3
FAMILIES = {family.name: family for family in (llama.FAMILY, gpt2.FAMILY, phi.FAMILY)}
KL_SAMPLES, KL_TOKENS = 32, 40


def parse_args(argv=None):
    parser = Parser(__doc__)
    targets = {name: ",".join(family.targets) for name, family in FAMILIES.items()}
    parser.add_argument("--model", choices=[*FAMILIES], default="llama", help="kind of model")
    parser.add_argument("--beta", type=amount, default=0.1,
        help="how dear it is to leave the reference")  # fmt: skip
    add_flags(parser, targets["llama"], LR)
    parser.set_defaults(task="preferences", batch_size=8, accumulation_steps=1, targets=None,
                        lora_dropout=0.0)  # fmt: skip
    args = parse(parser, argv, LR)
    args.targets = args.targets or targets[args.model]
    if args.task != "preferences":
        raise UserError(f"--task {args.task}: has no pairs; leave it out, give pairs by --data")
    if args.pack:
        raise UserError("--pack: pairs are not packed; leave it out")
    return args


def prepare_pairs(path, template, tokenizer, n_train: int, n_held_out: int, max_length: int,
                  skip_bad: bool):  # fmt: skip
    """Encoded pairs of both sides, as finetune.Data. Errors: UserError if a side is empty."""
    kind = TASKS["preferences"]
    found = find_template(template or kind.template, kind.field)
    splits = kind.splits(path, found, n_train, n_held_out, skip_bad)
    sides = splits.train[:n_train], splits.validation[:n_held_out]
    train_pairs, held_out = (encode_pairs(side, tokenizer, max_length) for side in sides)
    if not (train_pairs.rows and held_out.rows):
        raise UserError(f"{path or 'tinyworld'}: no pair fits --max-length {max_length}; raise it")
    return finetune.Data(train_pairs, held_out, sides[1], (), found)


def show_preferences(model, dpo, tokenizer, data, held_out, precision, seed, title: str) -> dict:
    """Prints how the model judges the held-out pairs, and how far it is from its reference."""
    found = preference_report(model, dpo, held_out, precision)
    kl, error = kl_to_reference(model, dpo, tokenizer, data.samples[:KL_SAMPLES], KL_TOKENS, seed)
    print(
        f"{title:>8}: loss {found['loss']:.4f}, accuracy {found['accuracy']:.1%}, margin "
        f"{found['margin']:.3f}, better one likelier {found['likelier']:.1%} of {found['n']} "
        f"pairs; KL to the reference {kl:.2f} +- {error:.2f} nats an answer", flush=True,
    )  # fmt: skip
    return found | {"kl": kl, "kl_error": error}


def main(argv=None) -> dict | None:
    args = parse_args(argv)
    family = FAMILIES[args.model]
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    dtype = finetune.frozen_dtype(args.frozen_dtype, args.method, precision.dtype)
    baseline = reset_peak(device)
    torch.manual_seed(args.seed)
    model, tokenizer, base = finetune.load_base(
        family, args.checkpoint, args.init, args.layers, args.tokenizer, dtype, device
    )
    model.attention = choose_attention(
        args.attention, precision.dtype, device, args.max_length, model.config.head_dim
    )
    model.gradient_checkpointing = args.gradient_checkpointing
    model, method = adapt(model, tokenizer, args.method, MethodOptions.from_flags(vars(args)))
    context = model.config.max_seq_len
    data = prepare_pairs(
        args.data, args.template, tokenizer, args.samples, args.held_out,
        min(args.max_length, context), args.skip_bad,
    )  # fmt: skip
    dpo = DPO(model, args.beta)
    rows, size = data.train.rows, 2 * args.batch_size
    batches = PairBatches(rows, size, tokenizer.pad_id, args.seed, context)
    held_out = list(PairBatches(data.held_out.rows, size, tokenizer.pad_id, None, context))
    folder = Path(args.out_dir) if args.out_dir else fresh_folder("runs", f"dpo-{args.model}")
    finetune.announce(model, base, precision, method, data, batches, args.accumulation_steps)
    preflight(
        model, dpo, batches, data.held_out.rows, tokenizer.eos_id, precision,
        args.accumulation_steps, folder,
    )  # fmt: skip
    if args.dry_run:
        return None
    identity = {"model": fingerprint(model)["bfloat16"], "data": data.hash()}
    run = Run(
        folder, settings_of(args), args.resume, args.overwrite, args.wandb_project, identity,
        args.override,
    )  # fmt: skip
    before = show_preferences(model, dpo, tokenizer, data, held_out, precision, args.seed, "before")
    finetune.show_answers(model, tokenizer, data, "before")
    reset_peak(device)
    settings = TrainSettings.from_flags(vars(args))
    progress, optimizer = train(model, dpo, batches, held_out, settings, precision, run)
    peak = peak_mib(device) - baseline
    finetune.keep(
        model, tokenizer, family, progress, run, args.method, base, data.template, args.keep_last
    )
    finetune.show_answers(model, tokenizer, data, "after")
    after = show_preferences(model, dpo, tokenizer, data, held_out, precision, args.seed, "after")
    write_json(folder / "preferences.json", {"before": before, "after": after, "ln 2": math.log(2)})
    memory = finetune.account(
        model, optimizer, batches, precision, args.accumulation_steps, peak
    )
    print("(memory and FLOPs are those of the model's own pass; the reference adds a forward"
          f"{', and a frozen copy' if dpo.copy is not None else ''})")  # fmt: skip
    finetune.conclude(model, memory, progress, data, run, method)
    return {"before": before, "after": after}


if __name__ == "__main__":
    with friendly_errors():
        main()
