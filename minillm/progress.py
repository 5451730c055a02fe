"""What a training is told and where it stands: settings, counters, the state of a checkpoint."""

import math
import random
import sys
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from minillm.errors import NumericError, UserError
from minillm.runs import Run


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
    compile: bool = False  # the loss, model and all, by torch.compile

    def n_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        n_steps = self.epochs * steps_per_epoch
        return min(n_steps, self.max_iters or n_steps)

    @classmethod
    def from_flags(cls, flags: dict) -> "TrainSettings":
        """Those of the flags (by name, with underscores) that are settings of the loop."""
        known = {f.name: flags[f.name] for f in fields(cls) if f.name in flags}
        return cls(**known, betas=(cls.betas[0], flags["beta2"]))


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


def out_of_patience(progress: Progress, settings: TrainSettings) -> bool:
    """Whether `patience` evaluations brought no new best."""
    return settings.patience is not None and progress.evaluations_since_best >= settings.patience


def check_schedule(
    run: Run | None, progress: Progress, settings: TrainSettings, steps_per_epoch: int
) -> None:
    """Warns where a schedule goes on as that of a longer or shorter run than it began with."""
    if run is None or progress.step == 0 or settings.schedule == "constant":
        return
    now = settings.n_steps(steps_per_epoch)
    lengths = {name: run.began.get(name.replace("_", "-"), getattr(settings, name))
               for name in ("epochs", "max_iters")}  # fmt: skip
    before = replace(settings, **lengths).n_steps(steps_per_epoch)
    if before != now:
        print(f"warning: the {settings.schedule} schedule began for {before} steps and goes on as "
              f"that of {now}", file=sys.stderr)  # fmt: skip


def save(run: Run, progress: Progress, model: nn.Module, optimizer, scaler) -> None:
    """Writes a checkpoint, if the run keeps any: all that `restore` puts back.

    Errors: NumericError, and nothing is written, for weights that are no numbers.
    """
    if not run.keeps_weights:
        return
    weights = trained(model)
    if bad := [name for name, value in weights.items() if not bool(value.isfinite().all())]:
        raise NumericError(f"{bad[0]} holds no numbers after step {progress.step}; lower --lr; the "
                           f"last good checkpoint: {run.newest() or 'none yet'}")  # fmt: skip
    state = {
        "model": weights, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
        "rng": rng_state(),
    }  # fmt: skip
    run.save(vars(progress) | state, progress.step)


def restore(run: Run | None, model: nn.Module, optimizer, scaler) -> Progress:
    """The state of the run's newest checkpoint put back, or a fresh start."""
    if run is None:
        return Progress()
    state, progress = run.load_newest(), Progress()
    if state is not None:
        parts = {"model", "optimizer", "scaler", "rng", *vars(progress)}
        if missing := sorted(parts - state.keys()):
            raise UserError(f"{run.newest()}: no checkpoint of a run, it lacks {missing[0]}; "
                            "remove it to resume from the one before")  # fmt: skip
        try:
            load_trainable(model, state["model"])
        except UserError as error:
            raise UserError(f"{run.newest()}: {error}") from None
        settings = optimizer.state_dict()["param_groups"]  # weight decay and the like: of now
        optimizer.load_state_dict({**state["optimizer"], "param_groups": settings})
        if state["scaler"]:  # empty if it was not fp16 that the run began in
            scaler.load_state_dict(state["scaler"])
        progress = Progress(**{name: state[name] for name in vars(progress)})
        set_rng_state(state["rng"])
    run.write_settings()
    return progress


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what `trained` shows, on the CPU."""
    return {name: x.cpu().clone() for name, x in trained(model).items()}


@torch.no_grad()
def load_trainable(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Puts trainable_state back. Errors: UserError if names or shapes differ."""
    kept = trained(model)
    if kept.keys() != weights.keys():
        raise UserError("the checkpoint trains other tensors; resume with the settings it began")
    for name, p in kept.items():
        if p.shape != weights[name].shape:
            raise UserError(f"{name} is {tuple(weights[name].shape)} in the checkpoint, here "
                            f"{tuple(p.shape)}; resume with the model it began with")  # fmt: skip
        p.copy_(weights[name])


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What requires a gradient, and the buffers that belong to the model's state: the start of a
    re-parametrised prefix, which another seed or text would draw anew. Not copies, by name."""
    state = model.state_dict().keys()
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return found | {name: b for name, b in model.named_buffers() if name in state}


def rng_state() -> dict:
    """Every random stream that training may draw from, as plain types and tensors."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict) -> None:
    """Puts every random stream back where rng_state found it."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        n = torch.cuda.device_count()  # perhaps fewer than where the run began
        torch.cuda.set_rng_state_all(state["cuda"][:n])
