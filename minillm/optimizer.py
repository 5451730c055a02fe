"""AdamW over what is trained, its learning rate, and one step of it.

Sources: Loshchilov & Hutter 2019 (AdamW), 2017 (cosine schedule); Micikevicius et al. 2018 (loss
scaling).
"""

import inspect
import math

import torch
from torch import nn

from minillm.errors import NumericError, UserError
from minillm.progress import Progress, TrainSettings


class AdamW(torch.optim.AdamW):
    """torch.optim's own methods, without what wraps them for torch.compile: the first call of any
    would import the compiler (820 modules, 70 MiB, a second)."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def make_optimizer(model: nn.Module, settings: TrainSettings) -> AdamW:
    """AdamW over the trainable tensors; weight decay on matrices only. Errors: UserError if none
    is trainable, or one in 16 bits."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UserError("nothing to train: every tensor is frozen; choose another method or rank")
    narrow = [name for name, p in model.named_parameters()
              if p.requires_grad and p.element_size() < 4]  # fmt: skip
    if narrow:
        raise UserError(f"{narrow[0]} is trained in 16 bits, which round most updates away; keep "
                        "what is trained in fp32, and what is frozen as narrow as you "
                        "like")  # fmt: skip
    matrices = [p for p in trainable if p.dim() > 1]
    vectors = [p for p in trainable if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


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
