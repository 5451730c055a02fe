"""The steps that every fine-tuning script shares, whatever its model: flags, data, adaptation,
samples before and after, the report, and what is left on disk."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minillm.adapt.lora import add_lora, mark_only_lora_as_trainable
from minillm.cli import Parser, positive
from minillm.data.batches import Batches, Encoded, encode_samples
from minillm.data.tasks import Sample, alpaca_sample, read_alpaca, split_by_hash
from minillm.data.templates import Template
from minillm.data.tinyworld import instructions
from minillm.errors import UserError
from minillm.generate import generate
from minillm.memory import memory_by_category
from minillm.precision import DTYPES
from minillm.training import TrainSettings

EVAL_BATCH = 8  # rows in a batch of held-out samples


def add_flags(parser: Parser, targets: str) -> None:
    """The flags of DESIGN's list that every fine-tuning script takes; `targets` is the default."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--checkpoint", help="folder or file of weights (default: the bundled tiny model)")
    add("--init", metavar="PRESET", help="random weights of a published size, e.g. llama-2-7b")
    add("--layers", type=positive, help="keep only the first N layers (the others are not read)")
    add("--tokenizer", help="tokenizer file, where the checkpoint has none beside it")
    add("--attention", choices=["sdpa", "explicit"], default="sdpa",
        help="fused kernel, or scores, mask, softmax one by one: for the debugger")  # fmt: skip
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--task", choices=["alpaca"], default="alpaca", help="what the data is")
    add("--data", help="Alpaca JSON or JSONL (default: instructions about tinyworld)")
    add("--template", default="alpaca", help="prompt text: alpaca, plain, or a .json file")
    add("--samples", type=positive, default=200, help="train on the first N samples")
    add("--held-out", type=positive, default=100, help="measure the loss on at most N samples")
    add("--max-length", type=positive, default=512, help="tokens of a sample, EOS included")
    group = parser.add_argument_group("method")
    add = group.add_argument
    add("--method", choices=["lora", "full"], default="lora", help="what is trained")
    add("--rank", type=int, default=16, help="LoRA: rows of A")
    add("--alpha", type=float, default=32, help="LoRA: the update counts alpha / rank")
    add("--lora-dropout", type=float, default=0.05, help="LoRA: dropout on its input")
    add("--targets", default=targets, help=f"LoRA: layers, comma-separated (default: {targets})")
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--epochs", type=positive, default=1, help="passes over the samples")
    add("--max-iters", type=positive, help="stop after N optimizer steps")
    add("--lr", type=float, default=1e-5, help="peak learning rate")
    add("--schedule", choices=["constant", "cosine", "linear"], default="constant")
    add("--warmup", type=int, default=0, help="optimizer steps from lr 0 to the peak")
    add("--batch-size", type=positive, default=1, help="samples in one forward")
    add("--accumulation-steps", type=positive, default=8, help="forwards in an optimizer step")
    add("--weight-decay", type=float, default=0.0)
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm, 0 for no limit")
    add("--eval-every", type=positive, help="optimizer steps between held-out losses")
    add("--patience", type=positive, help="stop after N evaluations without a new best")
    add("--seed", type=int, default=0)
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=["auto", *DTYPES], default="auto",
        help="of matrix products; auto: bf16 where it runs in hardware")  # fmt: skip
    add("--frozen-dtype", choices=["auto", *DTYPES], default="auto",
        help="how frozen weights are stored; auto: as --precision computes")  # fmt: skip
    add("--gradient-checkpointing", action="store_true",
        help="recompute each block in backward: less memory, about a third more time")  # fmt: skip
    group = parser.add_argument_group("run folder")
    add = group.add_argument
    add("--out-dir", help="where the run is kept (default: a fresh folder under runs/)")
    add("--resume", action="store_true", help="continue the run in --out-dir")
    add("--overwrite", action="store_true", help="replace the run in --out-dir")


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
        rows = instructions(2 * (n_train + n_held_out) + 200)
        samples = [alpaca_sample(row, template, "tinyworld") for row in rows]
    else:
        samples = read_alpaca(path, template)
    train, held_out = split_by_hash(samples)
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
    room = model.config.max_seq_len - len(tokens)
    new = generate(model, [tokens], min(60, room), eos_id=tokenizer.eos_id)[0]
    print(f"{title:>8}: {tokenizer.decode(new).strip()!r}")


def describe_data(data: Data, settings: TrainSettings, batches: Batches) -> str:
    """Samples, tokens and supervised tokens on both sides, and per optimizer step."""
    per_epoch = batches.groups_per_epoch(settings.accumulation_steps)
    supervised = sum(int((row.labels >= 0).sum()) for row in data.train.rows)
    return (
        f"   train: {data.train.summary()}\nheld out: {data.held_out.summary()}\n"
        f"    step: {settings.accumulation_steps} x {batches.batch_size} samples, "
        f"{supervised / per_epoch:.0f} supervised tokens on average, {per_epoch} steps an epoch"
    )


def describe_memory(model: nn.Module, optimizer, peak: float, baseline: float) -> str:
    """A line per category in MiB; on a CPU `baseline` (Python and its libraries) is left out."""
    parts = memory_by_category(model, optimizer, max(0.0, peak - baseline))
    lines = [f"  {name:<22}{mib:10.1f} MiB" for name, mib in parts.items()]
    return "\n".join(["memory", *lines])


def adapter_folder(run_folder: Path, method: str) -> Path:
    """Where a finished run keeps its result: adapter/, or model/ for full fine-tuning."""
    return run_folder / ("model" if method == "full" else "adapter")


def frozen_dtype(name: str, method: str, compute: torch.dtype) -> torch.dtype:
    """How the base is stored: trained weights in fp32 always, frozen ones as asked or computed."""
    if method == "full":
        return torch.float32
    return compute if name == "auto" else DTYPES[name]
