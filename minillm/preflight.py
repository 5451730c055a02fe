"""Checks before the first step, a line each: what would fail at hour nine fails now.

The largest forward of the run is taken once, backward and all, and forgotten: the random streams
are put back and no gradient stays, so a run with these checks is a run without them, bit for bit.
"""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from minillm.data.batches import Row, to_device
from minillm.errors import NumericError, UserError
from minillm.job import Job
from minillm.losses import IGNORED
from minillm.memory import MIB, free_mib
from minillm.precision import Precision, has_native_bf16
from minillm.training import LossFn

if TYPE_CHECKING:
    from minillm.footprint import Footprint

CHECKPOINT = 3  # times the trainable numbers: themselves and AdamW's two moments
FILES = 4  # checkpoints at once: the newest two, one being written, and (smaller) the best


def preflight(job: Job, loss_fn: LossFn, folder: Path | None) -> None:
    """Prints what was checked; `folder` is where checkpoints go, None if none are kept. Errors:
    UserError with what to change where the run cannot succeed; NumericError for a loss that is no
    number to begin with; RuntimeError for a gradient that goes missing or astray, which is a fault
    of ours."""
    model, rows, precision = job.model, job.batches.rows, job.base.precision
    lines = [
        check_device(precision),
        check_context(rows, job.data.held_out.rows, model.config.max_seq_len),
        check_labels(rows, job.base.tokenizer.eos_id),
        check_held_out(rows, job.data.held_out.rows, job.batches.rows_of_a_sample),
        check_disk(model, folder),
        check_memory(job.predicted, precision.device),
        dry_step(
            model, loss_fn, job.batches.largest(job.training.accumulation_steps), precision
        ),
    ]
    for number, line in enumerate(lines):
        print(f"{'  checks: ' if number == 0 else '':10}{line}", flush=True)


def check_device(precision: Precision) -> str:
    """Whether the dtype is the hardware's own."""
    device = precision.device
    emulated = precision.name == "bf16" and not has_native_bf16(device)
    note = "native"
    if emulated:
        note = "bf16 is emulated here, which is slow: better fp32 or auto, also as --frozen-dtype"
    return f"{precision.name} products on {device}: {note}"


def check_context(rows: list[Row], held_out: list[Row], context: int) -> str:
    """The longest sample of each side against the model's context."""
    longest = [max(len(row.tokens) for row in side) for side in (rows, held_out)]
    if max(longest) - 1 > context:
        raise UserError(f"a sample of {max(longest)} tokens does not fit the context of {context}; "
                        "lower --max-length")  # fmt: skip
    return f"longest sample {longest[0]} tokens, held out {longest[1]}; the context is {context}"


def check_labels(rows: list[Row], eos_id: int) -> str:
    """What share of the tokens is supervised, and whether the model is shown where to stop."""
    n_tokens = sum(len(row.tokens) for row in rows)
    n_labels = sum(row.n_labels for row in rows)
    if n_labels == 0:
        raise UserError("no training token is supervised; raise --max-length or give other data")
    ended = sum(bool((row.labels == eos_id).any()) for row in rows)
    never = "" if ended else ": the model will not learn to stop"
    return (f"{n_labels / n_tokens:.1%} of the tokens supervised; {ended} of {len(rows)} samples "
            f"end with the end-of-text token{never}")  # fmt: skip


def check_held_out(rows: list[Row], held_out: list[Row], n: int = 1) -> str:
    """Whether what is held out is new to the model; `n` rows make a sample."""
    trained = {_key(rows[i : i + n]) for i in range(0, len(rows), n)}
    asked = {_prompt(row) for row in rows[::n]} - {b""}
    samples = [held_out[i : i + n] for i in range(0, len(held_out), n)]
    new = [sample for sample in samples if _key(sample) not in trained]
    known, found = len(samples) - len(new), []
    if known:
        found.append(f"{known} of {len(samples)} held-out samples are also trained on, word for "
                     "word: their loss says nothing of new text")  # fmt: skip
    if n_asked := sum(_prompt(sample[0]) in asked for sample in new):
        found.append(f"{n_asked} of {len(samples)} held-out samples have a prompt that is trained "
                     "on, with another answer")  # fmt: skip
    return "; ".join(found) or "no held-out sample or prompt is among those trained on"


def _key(sample: list[Row]) -> bytes:
    return b"|".join(row.tokens.numpy().tobytes() for row in sample)


def _prompt(row: Row) -> bytes:
    """What lies before the first supervised token; nothing where that is at most BOS."""
    n = int((row.labels == IGNORED).cumprod(0).sum())
    return row.tokens[:n].numpy().tobytes() if n > 1 else b""


def check_disk(model: nn.Module, folder: Path | None) -> str:
    """What checkpoints will take against what is free."""
    if folder is None:
        return "no weights are kept"
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    need = FILES * CHECKPOINT * trained
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    free += sum(file.stat().st_size for file in folder.glob("*.pt"))  # which new ones replace
    if free < need:
        raise UserError(f"{folder}: no space for checkpoints (need {need / MIB:,.1f} MiB, free "
                        f"{free / MIB:,.1f}); name another --out-dir")  # fmt: skip
    return f"a checkpoint takes {CHECKPOINT * trained / MIB:,.1f} MiB of {free / MIB:,.0f} free"


def check_memory(found: "Footprint", device: torch.device) -> str:
    """What a step will take beyond the weights, which are there, against what is free."""
    need, free = (found.total - found.frozen - found.trainable) / MIB, free_mib(device)
    if free and need > free:
        raise UserError(
            f"out of memory: a step needs {need:,.0f} MiB beside the weights, {free:,.0f} are "
            "free; lower --batch-size, --pack or --max-length, or add --gradient-checkpointing"
        )
    return f"a step takes {need:,.1f} MiB beside the weights, {free:,.0f} are free"


def dry_step(model: nn.Module, loss_fn: LossFn, batch: tuple, precision: Precision) -> str:
    """Forward and backward of one batch: who gets a gradient. Nothing of it stays."""
    named, was_training = dict(model.named_parameters()), model.training
    devices = [precision.device] if precision.device.type == "cuda" else []
    batch = to_device(batch, precision.device)
    with torch.random.fork_rng(devices):
        model.train()
        with precision.autocast():
            loss, count, *_ = loss_fn(model, batch)
        loss.backward()
        model.train(was_training)
    loss = float(loss.detach()) / max(1, int(count))
    got = {name for name, p in named.items() if p.grad is not None}
    for p in named.values():
        p.grad = None
    trained = {name for name, p in named.items() if p.requires_grad}
    if not math.isfinite(loss):
        raise NumericError(f"the loss is {loss} before any step; the weights hold no numbers, or "
                           "--precision fp16 is too narrow for them")  # fmt: skip
    if missed := sorted(trained - got):
        raise RuntimeError(f"no gradient reached {', '.join(missed[:5])}")
    if astray := sorted(got - trained):
        raise RuntimeError(f"a gradient reached frozen {', '.join(astray[:5])}")
    n_frozen = len(named) - len(trained)
    return f"a dry step: a gradient for all {len(trained)} trained tensors, for none of " \
           f"{n_frozen} frozen; loss {loss:.4f}"  # fmt: skip
