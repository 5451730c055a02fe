"""The training loop, raw: autocast, backward, unscale, clip, step.

One loop serves every objective and every method: it sees a model, a function
`loss_fn(model, batch) -> (loss_sum, count)`, and trains whatever requires a gradient. A third
value, {name: sum}, is logged as means over the count.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minillm.adapt.lora import evaluating
from minillm.data.batches import Batches, to_device
from minillm.errors import Interrupted, NumericError, UserError
from minillm.interrupt import deferred_signals
from minillm.losses import IGNORED
from minillm.memory import keep_freed_memory, used_mib
from minillm.optimizer import average_and_clip, lr_at, make_optimizer, set_lr, take_step
from minillm.precision import Precision
from minillm.progress import (
    Progress,
    TrainSettings,
    check_schedule,
    out_of_patience,
    restore,
    save,
    trained,
)
from minillm.runs import Run

LossFn = Callable[[nn.Module, tuple], tuple]  # (Tensor, Tensor) or (Tensor, Tensor, dict)


def train(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Batches,
    held_out: Iterable | None,
    settings: TrainSettings,
    precision: Precision,
    run: Run | None = None,
) -> tuple[Progress, torch.optim.Optimizer]:
    """Trains what requires a gradient; resumes exactly if `run` holds a checkpoint.

    The gradient of a step is the gradient of (sum of all its token losses) / (their count), over
    all micro-batches, also of the last, partial group. With `run`, logs every step, evaluates
    every `eval_every` steps and at the end, and keeps the newest and the best checkpoint. Ctrl-C
    and SIGTERM let the step end and a checkpoint be written. Errors: UserError if nothing is
    trainable; NumericError (exit 3) for a NaN or infinite loss; Interrupted.
    """
    keep_freed_memory(precision.device)
    if settings.compile:
        loss_fn = torch.compile(loss_fn)
    model.train()  # before the optimizer: it must hold the weights, not what LoRA has merged
    optimizer, scaler = make_optimizer(model, settings), precision.scaler()
    progress = restore(run, model, optimizer, scaler)
    steps_per_epoch = batches.groups_per_epoch(settings.accumulation_steps)
    every = settings.eval_every or (steps_per_epoch if settings.patience else None)
    last_step = settings.n_steps(steps_per_epoch)
    if progress.before is None and held_out is not None:
        progress.before = evaluate(model, loss_fn, held_out, precision)
    ended = progress.step >= last_step or out_of_patience(progress, settings)
    if ended:
        cut = last_step < settings.epochs * steps_per_epoch
        why = f"; --max-iters {settings.max_iters} ends it, raise it to go on" if cut else ""
        print(f"already complete: {progress.step} of {last_step} steps{why}", flush=True)
        if row := evaluate_late(model, loss_fn, held_out, precision, progress, run):
            save(run, progress, model, optimizer, scaler)
            run.replace_last(row)
    else:
        check_schedule(run, progress, settings, steps_per_epoch)
    bar = tqdm(total=last_step, initial=progress.step, desc="train", unit="step", leave=False)
    saved = time.monotonic()
    with deferred_signals() as asked, bar:
        while not ended:
            began = time.perf_counter()
            summed, count, n_tokens, supervised, told = 0.0, 0, 0, 0, Counter()
            for batch in batches.group(progress.step, settings.accumulation_steps):
                moved = to_device(batch, precision.device)
                with precision.autocast():
                    loss_sum, loss_count, *more = loss_fn(model, moved)
                scaler.scale(loss_sum).backward()
                summed += float(loss_sum.detach())
                del loss_sum  # else it splits the memory that backward has freed
                count += int(loss_count)
                n_tokens += count_tokens(batch)
                supervised += count_labels(batch, loss_count)
                told.update({k: float(v) for sums in more for k, v in sums.items()})
            loss = summed / max(1, count)
            scaler.unscale_(optimizer)
            norm = average_and_clip(optimizer, count, settings.grad_clip)
            broke = not math.isfinite(norm) and not scaler.is_enabled()  # in fp16 an overflow
            if broke or not math.isfinite(loss):
                raise broken_step(loss, norm, progress, batches, settings, run)
            check_step(model, progress)
            lr = set_lr(optimizer, lr_at(progress.step, last_step, settings))
            stepped = take_step(scaler, optimizer, progress)
            seconds = time.perf_counter() - began
            if not stepped:  # fp16 overflow: the same samples again, with half the scale
                tqdm.write(f"step {progress.step + 1} overflowed fp16 and is taken again, its loss "
                           f"scaled by {scaler.get_scale():g}")  # fmt: skip
                continue
            progress.count(n_tokens, supervised, seconds)
            ended = progress.step >= last_step
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
            row = {
                "step": progress.step, "loss": loss, "lr": lr, "grad_norm": norm,
                "tokens": n_tokens, "supervised_tokens": supervised,
                "tokens_per_s": n_tokens / seconds, "memory_mib": used_mib(precision.device),
            } | {k: v / max(1, count) for k, v in told.items()}  # fmt: skip
            evaluated = ended or (every and progress.step % every == 0)
            if evaluated and held_out is not None:
                row["held_out_loss"] = evaluate(model, loss_fn, held_out, precision)
                note_held_out(row, progress, model, run)
                ended |= out_of_patience(progress, settings)
            stop = asked.signal  # read once: a signal during the save is the next step's
            if run is not None:
                run.log(row)
                due = time.monotonic() - saved > 60 * settings.save_every
                if evaluated or due or stop:
                    save(run, progress, model, optimizer, scaler)
                    saved = time.monotonic()
            ended |= stop is not None
        if asked.signal is not None:  # also one that came during the last save
            newest = run.newest() if run is not None and run.keeps_weights else None
            where = f"kept {newest}; --resume continues" if newest else "not kept"
            raise Interrupted(asked.signal, where)
    return progress, optimizer


def count_tokens(batch: tuple) -> int:
    """Tokens of a batch, without paddings where it knows its rows' lengths."""
    return int(batch.lengths.sum()) if hasattr(batch, "lengths") else batch[0].numel()


def count_labels(batch: tuple, otherwise: Tensor) -> int:
    """Tokens of a batch that are predicted, where it has labels."""
    if not hasattr(batch, "labels"):
        return int(otherwise)
    return int((batch.labels[:, 1:] != IGNORED).sum())


def check_step(model: nn.Module, progress: Progress) -> None:
    """Errors: RuntimeError if LoRA is merged or, at the first step, if a trainable tensor got no
    gradient: both would train nothing, silently."""
    if any(getattr(module, "has_weights_merged", False) for module in model.modules()):
        raise RuntimeError("a training step with merged LoRA layers; call model.train() first")
    if progress.step == 0:
        missed = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if missed:
            raise RuntimeError(f"no gradient reached {', '.join(missed[:5])}")


def broken_step(
    loss: float, norm: float, progress: Progress, batches: Batches, settings: TrainSettings,
    run: Run | None,
) -> NumericError:  # fmt: skip
    """Which step it is that has a loss or gradient that is no number, of which samples, and what
    is left."""
    what = f"gradient of step {progress.step + 1} is {norm}"
    if not math.isfinite(loss):
        what = f"loss of step {progress.step + 1} is {loss}"
    rows = batches.numbers(progress.step, settings.accumulation_steps)
    numbers = [*dict.fromkeys(str(row // batches.rows_of_a_sample + 1) for row in rows)]
    shown = ", ".join(numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    newest = run.newest() if run is not None else None
    good = run.newest(besides=progress.step) if newest else None
    last = f"the last good checkpoint is {good}" if good else "there is no last good checkpoint"
    if newest != good:
        remedy = "remove it if it fails again" if good else "start again with --overwrite"
        last += f"; {newest} holds the weights that gave this, {remedy}"
    return NumericError(
        f"the {what} (training samples {shown}); lower --lr, or use --precision fp32; {last}"
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, loss_fn: LossFn, batches: Iterable, precision: Precision
) -> float:
    """Mean loss over all supervised tokens (nats per token), dropout off; the mode is put back.

    Errors: UserError if no token is supervised; NumericError for a loss that is no number.
    """
    total, count = 0.0, 0
    with precision.autocast(), evaluating(model):
        for batch in tqdm(batches, desc="held-out", unit="batch", leave=False):
            batch = to_device(batch, precision.device)
            loss_sum, loss_count, *_ = loss_fn(model, batch)
            total += float(loss_sum)
            count += int(loss_count)
    if count == 0:
        raise UserError("the held-out samples hold no supervised token; give others")
    if not math.isfinite(total):
        raise NumericError(f"the held-out loss is {total}; lower --lr, or use --precision fp32")
    return total / count


def evaluate_late(
    model: nn.Module, loss_fn: LossFn, held_out: Iterable | None, precision: Precision,
    progress: Progress, run: Run | None,
) -> dict | None:  # fmt: skip
    """Evaluates the last step of a run that was stopped there and is to end there: its line of the
    log, then; None for a run that came to its end."""
    row = run.last_row(progress.step) if run is not None else {}
    if run is None or held_out is None or "held_out_loss" in row:
        return None
    row["held_out_loss"] = evaluate(model, loss_fn, held_out, precision)
    note_held_out(row, progress, model, run)
    return row


def note_held_out(row: dict, progress: Progress, model: nn.Module, run: Run | None) -> None:
    """Prints an evaluated step and keeps its weights if they are the best so far."""
    held_out = row["held_out_loss"]
    loss = row.get("loss", math.nan)  # of a step whose line was lost
    tqdm.write(f"step {row['step']:5d}  loss {loss:.4f}  held-out {held_out:.4f}")
    is_best = held_out < progress.best
    progress.evaluations_since_best = 0 if is_best else progress.evaluations_since_best + 1
    if is_best:
        progress.best, progress.best_step = held_out, row["step"]
        if run is not None and run.keeps_weights:
            run.save_best(trained(model), row["step"])
