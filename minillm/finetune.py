"""The steps that every fine-tuning script shares, whatever its model: flags, data, adaptation,
samples before and after, the report, and what is left on disk."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from minillm.adapt.lora import add_lora, mark_only_lora_as_trainable
from minillm.cli import Parser, add_model_flags, amount, positive, share, whole
from minillm.data.batches import Batches, Encoded, encode_samples
from minillm.data.samples import Sample
from minillm.data.tasks import TASKS
from minillm.data.templates import Template, find_template
from minillm.errors import UserError
from minillm.family import Family
from minillm.files import read_json, write_json
from minillm.generate import generate
from minillm.hub import find_checkpoint
from minillm.losses import IGNORED
from minillm.memory import memory_by_category
from minillm.metrics import classification_report, describe
from minillm.peft_format import save_adapter
from minillm.plots import plot_run
from minillm.precision import DTYPES, Precision
from minillm.predict import predict_labels
from minillm.runs import Run
from minillm.training import Progress, load_trainable
from minillm.weights import check_tokenizer, empty_model, materialize

EVAL_BATCH = 8  # rows in a batch of held-out samples


def add_flags(parser: Parser, targets: str) -> None:
    """The flags that every fine-tuning script takes; `targets` is the model's default for LoRA."""
    add = add_model_flags(parser).add_argument
    add("--init", metavar="PRESET", help="random weights of a published size, e.g. llama-2-7b")
    add = parser.add_argument_group("data").add_argument
    add("--task", choices=[*TASKS], default="alpaca", help="what the data is")
    add("--data", help="the task's official file or folder (default: tinyworld's stand-in)")
    add("--template", help="prompt text by name, or a .json file (default: the task's own)")
    add("--samples", type=positive, default=200, help="train on the first N samples")
    add("--held-out", type=positive, default=100, help="measure the loss on at most N samples")
    add("--max-length", type=positive, default=512, help="tokens of a sample, EOS included")
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=["lora", "full"], default="lora", help="what is trained")
    add("--rank", "--lora-rank", type=whole, default=16,
        help="LoRA: rows of A; 0 is full fine-tuning")  # fmt: skip
    add("--alpha", "--lora-alpha", type=amount, default=32,
        help="LoRA: the update counts alpha / rank")  # fmt: skip
    add("--lora-dropout", type=share, default=0.05, help="LoRA: dropout on its input")
    add("--targets", default=targets, help=f"LoRA: layers, comma-separated (default: {targets})")
    _add_training_flags(parser)
    add = parser.add_argument_group("run folder").add_argument
    add("--out-dir", help="where the run is kept (default: a fresh folder under runs/)")
    add("--keep-last", action="store_true",
        help="also save the last step's weights, beside the best on held-out data")  # fmt: skip
    add("--wandb-project", help="also log to this Weights & Biases project, if it is installed")
    add("--resume", action="store_true", help="continue the run in --out-dir")
    add("--overwrite", action="store_true", help="replace the run in --out-dir")


def _add_training_flags(parser: Parser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=1, help="passes over the samples")
    add("--max-iters", type=positive, help="stop after N optimizer steps")
    add("--lr", "--learning-rate", type=amount, default=1e-5, help="peak learning rate")
    add("--schedule", choices=["constant", "cosine", "linear"], default="constant",
        help="of the learning rate after the warm-up")  # fmt: skip
    add("--warmup", type=whole, default=0, help="optimizer steps from lr 0 to the peak")
    add("--batch-size", type=positive, default=1, help="samples in one forward")
    add("--accumulation-steps", type=positive, default=8, help="forwards in an optimizer step")
    add("--weight-decay", type=amount, default=0.0, help="AdamW's, on matrices")
    add("--grad-clip", type=amount, default=1.0, help="largest gradient norm, 0 for no limit")
    add("--eval-every", type=positive, help="optimizer steps between held-out losses")
    add("--patience", type=positive, help="stop after N evaluations without a new best")
    add("--seed", type=whole, default=0, help="of LoRA's A, of the order and of dropout")
    add("--precision", choices=["auto", *DTYPES], default="auto",
        help="of matrix products; auto: bf16 where it runs in hardware")  # fmt: skip
    add("--frozen-dtype", choices=["auto", *DTYPES], default="auto",
        help="how frozen weights are stored; auto: as --precision computes")  # fmt: skip
    add("--gradient-checkpointing", action="store_true",
        help="recompute each block in backward: less memory, about a third more time")  # fmt: skip


def parse(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """The flags; `--init-from resume` (the course's spelling) takes all settings of the run in
    --out-dir and continues it. Errors: UserError."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    if args.checkpoint == "resume":
        if args.out_dir is None:
            raise UserError("--init-from resume: which run? add --out-dir FOLDER")
        kept = Path(args.out_dir) / "config.json"
        began = read_json(kept)
        args = parser.parse_args(["--config", str(kept), *argv, "--resume"])
        args.checkpoint = began.get("checkpoint")
    if args.rank == 0:
        args.method = "full"
    return args


def load_base(
    family: Family, checkpoint: str | None, preset: str | None, layers: int | None,
    tokenizer: str | None, dtype: torch.dtype, device: torch.device,
):  # fmt: skip
    """The model and tokenizer that the flags ask for, and a name for the base."""
    if preset is None:
        path = find_checkpoint(checkpoint or family.bundled)
        return *family.load(path, layers, dtype, device, tokenizer), str(path)
    if checkpoint is not None:
        raise UserError("--init and --checkpoint contradict each other; give one of them")
    config = family.config.preset(preset)
    if layers is not None and layers > config.n_layers:
        raise UserError(f"--layers {layers}: {preset} has {config.n_layers} layers; lower it")
    if tokenizer is None:
        raise UserError("--init: random weights come without a tokenizer; add --tokenizer FILE")
    text = family.tokenizer(tokenizer)
    check_tokenizer(text, config.vocab_size, tokenizer)
    config = replace(config, n_layers=layers or config.n_layers)
    model = empty_model(lambda: family.model(config))
    return materialize(model, dtype, device), text, f"{preset} (random weights)"


@dataclass(frozen=True)
class Data:
    """Encoded training and held-out samples, the latter also as text, and what they are of."""

    train: Encoded
    held_out: Encoded
    samples: list[Sample]  # the held-out ones
    labels: tuple[str, ...]
    template: Template

    @property
    def shown(self) -> Sample:
        """One held-out sample to look at."""
        return min(self.samples, key=lambda sample: len(sample.prompt))


def prepare_data(
    task: str, path: str | None, template: str | None, tokenizer, n_train: int, n_held_out: int,
    max_length: int,
) -> Data:  # fmt: skip
    """Reads a task's data (or makes tinyworld's) and encodes the first so many of each side.

    Errors: UserError naming the file for anything wrong in it, or if no sample is left.
    """
    kind = TASKS[task]
    found = find_template(template or kind.template, kind.field)
    splits = kind.read(path, found) if path else kind.tinyworld(n_train, n_held_out, found)
    sides = splits.train[:n_train], splits.validation[:n_held_out]
    encoded = [encode_samples(side, tokenizer, max_length) for side in sides]
    for side in encoded:
        if not side.rows:
            raise UserError(
                f"{path or 'tinyworld'}: every prompt is longer than --max-length {max_length}; "
                "raise it"
            )
    return Data(*encoded, sides[1], kind.labels, found)


def adapt(model: nn.Module, method: str, targets: str, rank: int, alpha: float, dropout: float):
    """Makes exactly the method's tensors trainable. Returns a line that explains their number."""
    base = sum(p.numel() for p in model.parameters())
    if method == "full":
        return f"full fine-tuning: all {base:,} parameters"
    names = [target.strip() for target in targets.split(",") if target.strip()]
    n_layers = add_lora(model, names, rank, alpha, dropout)
    mark_only_lora_as_trainable(model)
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"LoRA rank {rank}, alpha {alpha:g} (scale {alpha / rank:g}) on {n_layers} layers "
        f"({', '.join(names)}): {added:,} trainable, which is {100 * added / base:.4f} % of the "
        f"base's {base:,} parameters and {100 * added / (base + added):.4f} % of base + LoRA"
    )


def show_sample(model: nn.Module, tokenizer, sample: Sample, title: str) -> None:
    """Prints what the model answers, greedily, to one held-out prompt."""
    tokens = tokenizer.encode(sample.prompt, bos=True)
    (new,) = generate(model, [tokens], 60, eos_id=tokenizer.eos_id)
    print(f"{title:>8}: {tokenizer.decode(new).strip()!r}", flush=True)


def announce(
    model: nn.Module, base: str, precision: Precision, method: str, data: Data,
    batches: Batches, accumulation_steps: int,
) -> None:  # fmt: skip
    """Prints what is about to run: model, method, data on both sides, the optimizer step."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    steps = batches.groups_per_epoch(accumulation_steps)
    supervised = sum(int((row.labels != IGNORED).sum()) for row in data.train.rows)
    print(f"   model: {base}, {model.config.n_layers} layers in {' and '.join(sorted(dtypes))}; "
          f"{precision.name} products on {precision.device}")  # fmt: skip
    print(f"  method: {method}")
    print(f"   train: {data.train.summary()}\nheld out: {data.held_out.summary()}")
    print(f"    step: {accumulation_steps} x {batches.batch_size} samples, on average "
          f"{supervised / steps:.0f} supervised tokens; {steps} steps an epoch")  # fmt: skip
    print(f"  prompt: {data.shown.prompt!r}\nexpected: {data.shown.response!r}", flush=True)


def show_answers(model: nn.Module, tokenizer, data: Data, title: str) -> None:
    """Prints what the model answers, greedily, to one held-out prompt, and where the answer is one
    of a few labels, its accuracy on all held-out samples."""
    show_sample(model, tokenizer, data.shown, title)
    if data.labels:
        answers = predict_labels(model, tokenizer, data.samples, data.labels)
        truth = [sample.label for sample in data.samples]
        report = classification_report([a.label for a in answers], truth, data.labels)
        print(f"{'':>8}  held-out {describe(report)}", flush=True)


def conclude(
    model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, peak: float
) -> None:
    """Prints memory by category (peak in MiB, without Python and its libraries), speed, losses."""
    print("memory")
    for name, mib in memory_by_category(model, optimizer, peak).items():
        print(f"  {name:<22}{mib:10.1f} MiB")
    speed = progress.tokens / max(progress.seconds, 1e-9)
    print(f"{progress.step} steps, {progress.tokens} tokens in {progress.seconds:.1f} s: "
          f"{speed:.0f} tokens/s")  # fmt: skip
    print(f"held-out loss {progress.before:.4f} -> {progress.best:.4f}")


def keep(
    model: nn.Module, tokenizer, family: Family, progress: Progress, run: Run, method: str,
    base: str, template: Template, keep_last: bool,
) -> None:  # fmt: skip
    """Saves the weights with the lowest held-out loss as adapter/ (or model/), which are then the
    model's, the last ones as adapter_last/ if asked, and the picture."""

    def save(suffix: str = "") -> None:
        if method == "full":
            folder = run.folder / f"model{suffix}"
            family.save(model, tokenizer, folder)
            write_json(folder / "template.json", template.to_dict())
        else:
            save_adapter(model, run.folder / f"adapter{suffix}", base, template.to_dict())

    if keep_last:
        save("_last")
    if progress.best_step != progress.step:
        print(f"keeping step {progress.best_step} of {progress.step}, the best on held-out data")
        load_trainable(model, run.load_best())
    save()
    plot_run(run.rows(), run.folder / "loss.png")
    print(f"kept in {run.folder}")


def frozen_dtype(name: str, method: str, compute: torch.dtype) -> torch.dtype:
    """How the base is stored: trained weights in fp32 always, frozen ones as asked or computed."""
    if method == "full":
        return torch.float32
    return compute if name == "auto" else DTYPES[name]
