"""The steps that every fine-tuning script shares, whatever its model: flags, data, adaptation,
samples before and after, the report, and what is left on disk."""

from dataclasses import dataclass

import torch
from torch import nn

from minillm.adapt.lora import add_lora, mark_only_lora_as_trainable
from minillm.cli import Parser, add_model_flags, amount, positive, share, whole
from minillm.data.batches import Batches, Encoded, encode_samples
from minillm.data.tasks import Sample, alpaca_sample, read_alpaca, split_by_hash
from minillm.data.templates import Template
from minillm.data.tinyworld import instructions
from minillm.errors import UserError
from minillm.generate import generate
from minillm.losses import IGNORED
from minillm.memory import memory_by_category
from minillm.precision import DTYPES, Precision
from minillm.runs import Run
from minillm.training import Progress, load_trainable

EVAL_BATCH = 8  # rows in a batch of held-out samples


def add_flags(parser: Parser, targets: str) -> None:
    """The flags that every fine-tuning script takes; `targets` is the model's default for LoRA."""
    add = add_model_flags(parser).add_argument
    add("--init", metavar="PRESET", help="random weights of a published size, e.g. llama-2-7b")
    add = parser.add_argument_group("data").add_argument
    add("--task", choices=["alpaca"], default="alpaca", help="what the data is")
    add("--data", help="Alpaca JSON or JSONL (default: instructions about tinyworld)")
    add("--template", default="alpaca", help="prompt text: alpaca, plain, or a .json file")
    add("--samples", type=positive, default=200, help="train on the first N samples")
    add("--held-out", type=positive, default=100, help="measure the loss on at most N samples")
    add("--max-length", type=positive, default=512, help="tokens of a sample, EOS included")
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=["lora", "full"], default="lora", help="what is trained")
    add("--rank", type=int, default=16, help="LoRA: rows of A")
    add("--alpha", type=amount, default=32, help="LoRA: the update counts alpha / rank")
    add("--lora-dropout", type=share, default=0.05, help="LoRA: dropout on its input")
    add("--targets", default=targets, help=f"LoRA: layers, comma-separated (default: {targets})")
    _add_training_flags(parser)
    add = parser.add_argument_group("run folder").add_argument
    add("--out-dir", help="where the run is kept (default: a fresh folder under runs/)")
    add("--resume", action="store_true", help="continue the run in --out-dir")
    add("--overwrite", action="store_true", help="replace the run in --out-dir")


def _add_training_flags(parser: Parser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=1, help="passes over the samples")
    add("--max-iters", type=positive, help="stop after N optimizer steps")
    add("--lr", type=amount, default=1e-5, help="peak learning rate")
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


@dataclass(frozen=True)
class Data:
    """Encoded training and held-out samples, and one held-out sample to look at."""

    train: Encoded
    held_out: Encoded
    shown: Sample


def prepare_data(
    path: str | None, template: Template, tokenizer, n_train: int, n_held_out: int, max_length: int
) -> Data:
    """Reads (or makes) samples, splits them by hash, encodes them.

    A tenth of all rows is held out; of the rest the first `n_train` are trained on.
    Errors: UserError naming the file for anything wrong in it, or if no sample is left.
    """
    if path is None:
        rows = instructions(n_train * 6 // 5 + n_held_out * 12)
        samples = [alpaca_sample(row, template, "tinyworld") for row in rows]
    else:
        samples = read_alpaca(path, template)
    train, held_out = split_by_hash(samples, path or "tinyworld")
    encoded = [
        encode_samples(side[:n], tokenizer, max_length)
        for side, n in ((train, n_train), (held_out, n_held_out))
    ]
    for side in encoded:
        if not side.rows:
            raise UserError(
                f"{path or 'tinyworld'}: every prompt is longer than --max-length {max_length}; "
                "raise it"
            )
    return Data(*encoded, min(held_out, key=lambda s: len(s.prompt)))


def adapt(model: nn.Module, method: str, targets: str, rank: int, alpha: float, dropout: float):
    """Makes exactly the method's tensors trainable. Returns a line that explains their number."""
    total = sum(p.numel() for p in model.parameters())
    if method == "full":
        return f"full fine-tuning: all {total:,} parameters"
    names = [target.strip() for target in targets.split(",") if target.strip()]
    n_layers = add_lora(model, names, rank, alpha, dropout)
    mark_only_lora_as_trainable(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"LoRA rank {rank}, alpha {alpha:g} (scale {alpha / rank:g}) on {n_layers} layers "
        f"({', '.join(names)}): {trainable:,} trainable of {total + trainable:,} parameters, "
        f"{100 * trainable / (total + trainable):.4f} % of base + LoRA"
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


def keep_best(model: nn.Module, progress: Progress, run: Run) -> None:
    """Puts back the weights with the lowest held-out loss, if those are not the last."""
    if progress.best_step != progress.step:
        print(f"keeping step {progress.best_step} of {progress.step}, the best on held-out data")
        load_trainable(model, run.load_best())


def frozen_dtype(name: str, method: str, compute: torch.dtype) -> torch.dtype:
    """How the base is stored: trained weights in fp32 always, frozen ones as asked or computed."""
    if method == "full":
        return torch.float32
    return compute if name == "auto" else DTYPES[name]
