"""The training loop, raw: autocast, backward, unscale, clip, step.

One loop serves every objective and every method: it sees a model, a function
`loss_fn(model, batch) -> (loss_sum, count)`, and trains whatever requires a gradient. A third
value, {name: sum}, is logged as means over the count.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minillm.data.batches import Batches
from minillm.errors import NumericError, UserError
from minillm.interrupt import deferred_signals
from minillm.losses import IGNORED
from minillm.memory import used_mib
from minillm.precision import Precision
from minillm.runs import Run, set_rng_state

LossFn = Callable[[nn.Module, tuple], tuple]  # (Tensor, Tensor) or (Tensor, Tensor, dict)


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Steps are optimizer steps; lr is the peak; `epochs` and `max_iters` both bound
    the run; `patience` counts evaluations without a new best held-out loss."""

    lr: float = 1e-5
    schedule: str = "constant"  # or "cosine", "linear": after the warm-up, down to zero
    warmup: int = 0
    epochs: int = 1
    max_iters: int | None = None
    accumulation_steps: int = 8
    grad_clip: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eval_every: int | None = None  # None: before and after, and with patience after each epoch
    save_every: float = 10.0  # minutes between checkpoints, beside those of evaluations
    patience: int | None = None

    @classmethod
    def from_flags(cls, flags: dict) -> "TrainSettings":
        """Those of the flags (by name, with underscores) that are settings of the loop."""
        return cls(**{f.name: flags[f.name] for f in fields(cls) if f.name in flags})


@dataclass
class Progress:
    """Where a run stands, all of it plain numbers: what a checkpoint stores beside the tensors."""

    step: int = 0  # optimizer steps taken, and so groups of micro-batches consumed
    skipped_in_a_row: int = 0
    before: float | None = None  # held-out loss, in nats per supervised token
    best: float = math.inf
    best_step: int = 0
    evaluations_since_best: int = 0
    seconds: float = 0.0  # spent training, evaluation left out
    tokens: int = 0
    supervised: int = 0

    def count(self, n_tokens: int, n_supervised: int, seconds: float) -> None:
        """Adds what one more step took."""
        self.tokens += n_tokens
        self.supervised += n_supervised
        self.seconds += seconds


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
    optimizer, scaler = make_optimizer(model, settings), precision.scaler()
    progress = restore(run, model, optimizer, scaler)
    epoch = batches.groups_per_epoch(settings.accumulation_steps)
    groups = settings.epochs * epoch
    every = settings.eval_every or (epoch if settings.patience else None)
    last_step = min(groups, settings.max_iters or groups)
    if progress.before is None and held_out is not None:
        progress.before = evaluate(model, loss_fn, held_out, precision)
    model.train()
    if progress.step >= last_step:
        print(f"already complete: {progress.step} of {last_step} steps", flush=True)
    bar = tqdm(total=last_step, initial=progress.step, desc="train", unit="step", leave=False)
    ended = progress.step >= last_step or out_of_patience(progress, settings)
    saved = time.monotonic()
    with deferred_signals() as asked, bar:
        while not ended:
            began = time.perf_counter()
            losses, count, n_tokens, supervised, told = [], 0, 0, 0, Counter()
            for batch in batches.group(progress.step, settings.accumulation_steps):
                batch = to_device(batch, precision.device)
                with precision.autocast():
                    loss_sum, loss_count, *more = loss_fn(model, batch)
                scaler.scale(loss_sum).backward()
                losses.append(loss_sum.detach())
                count += int(loss_count)
                n_tokens += count_tokens(batch)
                supervised += count_labels(batch, loss_count)
                told.update({k: float(v) for sums in more for k, v in sums.items()})
            loss = float(torch.stack(losses).sum()) / max(1, count)
            scaler.unscale_(optimizer)
            norm = average_and_clip(optimizer, count, settings.grad_clip)
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
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
            if run is not None:
                run.log(row)
                due = time.monotonic() - saved > 60 * settings.save_every
                if evaluated or due or asked.signal:
                    save(run, progress, model, optimizer, scaler)
                    saved = time.monotonic()
            asked.stop_if_asked(f"kept {run.newest()}; --resume continues" if run else "not kept")
    return progress, optimizer


def to_device(batch: tuple, device: torch.device) -> tuple:
    """The same kind of (named) tuple with its tensors on `device`."""
    moved = [x.to(device, non_blocking=True) if torch.is_tensor(x) else x for x in batch]
    return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)


def count_tokens(batch: tuple) -> int:
    """Tokens of a batch, without paddings where it knows its rows' lengths."""
    return int(batch.lengths.sum()) if hasattr(batch, "lengths") else batch[0].numel()


def count_labels(batch: tuple, otherwise: Tensor) -> int:
    """Tokens of a batch that are predicted, where it has labels."""
    if not hasattr(batch, "labels"):
        return int(otherwise)
    return int((batch.labels[:, 1:] != IGNORED).sum())


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the trainable tensors; weight decay on matrices only. Errors: UserError if none
    is trainable."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UserError("nothing to train: every tensor is frozen; choose another method or rank")
    matrices = [p for p in trainable if p.dim() > 1]
    vectors = [p for p in trainable if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """The learning rate of the next step, for all tensors; returned for the log."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def lr_at(step: int, last_step: int, settings: TrainSettings) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then the schedule.

    Errors: UserError for an unknown schedule.
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, last_step - settings.warmup)
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "linear":
        return settings.lr * (1 - done)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * done))
    raise UserError(f"schedule {settings.schedule!r} is unknown; use constant, cosine or linear")


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
    numbers = batches.numbers(progress.step, settings.accumulation_steps)
    shown = ", ".join(str(n + 1) for n in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    kept = run.newest() if run is not None else None
    last = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
    return NumericError(
        f"the {what} (training samples {shown}); lower --lr, or use --precision fp32; {last}"
    )


def average_and_clip(optimizer: torch.optim.Optimizer, count: int, max_norm: float) -> float:
    """Turns gradients of a summed loss into those of its mean over `count` terms, then clips their
    common norm. Returns the norm before clipping."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch._foreach_div_([p.grad for p in params], float(max(1, count)))
    return float(nn.utils.clip_grad_norm_(params, max_norm or math.inf))


def take_step(scaler, optimizer: torch.optim.Optimizer, progress: Progress) -> bool:
    """Optimizer step, scaler update, gradients freed. False if the scaler skipped it for an
    infinite gradient. Errors: NumericError after 20 skips in a row."""
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    stepped = scaler.get_scale() >= scale
    progress.step += stepped
    progress.skipped_in_a_row = 0 if stepped else progress.skipped_in_a_row + 1
    if progress.skipped_in_a_row == 20:
        raise NumericError(
            f"20 steps in a row overflowed fp16 after step {progress.step}; lower --lr or use fp32"
        )
    return stepped


@torch.no_grad()
def evaluate(
    model: nn.Module, loss_fn: LossFn, batches: Iterable, precision: Precision
) -> float:
    """Mean loss over all supervised tokens (nats per token), dropout off; the mode is put back.

    Errors: UserError if no token is supervised; NumericError for a loss that is no number.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in tqdm(batches, desc="held-out", unit="batch", leave=False):
        batch = to_device(batch, precision.device)
        with precision.autocast():
            loss_sum, loss_count, *_ = loss_fn(model, batch)
        total += float(loss_sum)
        count += int(loss_count)
    model.train(was_training)
    if count == 0:
        raise UserError("the held-out samples hold no supervised token; give others")
    if not math.isfinite(total):
        raise NumericError(f"the held-out loss is {total}; lower --lr, or use --precision fp32")
    return total / count


def note_held_out(row: dict, progress: Progress, model: nn.Module, run: Run | None) -> None:
    """Prints an evaluated step and keeps its weights if they are the best so far."""
    held_out = row["held_out_loss"]
    tqdm.write(f"step {row['step']:5d}  loss {row['loss']:.4f}  held-out {held_out:.4f}")
    is_best = held_out < progress.best
    progress.evaluations_since_best = 0 if is_best else progress.evaluations_since_best + 1
    if is_best:
        progress.best, progress.best_step = held_out, row["step"]
        if run is not None:
            run.save_best(trainable_state(model))


def save(run: Run, progress: Progress, model: nn.Module, optimizer, scaler) -> None:
    """Writes a checkpoint: all that `restore` puts back. Errors: NumericError, and nothing is
    written, for weights that are no numbers."""
    weights = trainable_state(model)
    if bad := [name for name, value in weights.items() if not bool(value.isfinite().all())]:
        raise NumericError(f"{bad[0]} holds no numbers after step {progress.step}; lower --lr; the "
                           f"last good checkpoint: {run.newest() or 'none yet'}")  # fmt: skip
    tensors = {
        "model": weights, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
    }  # fmt: skip
    run.save(vars(progress) | tensors, progress.step)


def out_of_patience(progress: Progress, settings: TrainSettings) -> bool:
    """Whether `patience` evaluations brought no new best."""
    return settings.patience is not None and progress.evaluations_since_best >= settings.patience


def restore(run: Run | None, model: nn.Module, optimizer, scaler) -> Progress:
    """The state of the run's newest checkpoint put back, or a fresh start."""
    state = run.load_newest() if run is not None else None
    if state is None:
        return Progress()
    load_trainable(model, state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    progress = Progress(**{name: state[name] for name in vars(Progress())})
    set_rng_state(state["rng"])
    return progress


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained, on the CPU, by name."""
    named = model.named_parameters()
    return {name: p.detach().cpu().clone() for name, p in named if p.requires_grad}


@torch.no_grad()
def load_trainable(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Puts trainable_state back. Errors: UserError if the names differ."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trainable.keys() != weights.keys():
        raise UserError("the checkpoint trains other tensors; resume with the settings it began")
    for name, p in trainable.items():
        if p.shape != weights[name].shape:
            raise UserError(f"{name} is {tuple(weights[name].shape)} in the checkpoint, here "
                            f"{tuple(p.shape)}; resume with the model it began with")  # fmt: skip
        p.copy_(weights[name])
