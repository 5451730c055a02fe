"""Dropout whose mask costs little on a CPU.

Drawing PyTorch's mask takes longer there than everything that is done with it: in a bf16 LoRA step
of GPT-2 124M, whose only dropout is LoRA's own, 4 % of the time.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

STEPS = 2**16  # of the rate: an element takes 16 bits, and four elements a random number


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU its rate is rounded to a multiple of 2^-16 (and what is kept is scaled
    by 1 / (1 - the rounded rate), so that means are exact)."""

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * STEPS)
        if not self.training or x.device.type != "cpu" or not 0 < dropped < STEPS:
            return super().forward(x)
        return _Dropout.apply(x, dropped)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dropped: int) -> Tensor:
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        draws = draws.view(torch.int16)[: x.numel()].view(x.shape)
        keep = draws.ge_(dropped - STEPS // 2).to(torch.int8)
        ctx.save_for_backward(keep)
        ctx.growth = STEPS / (STEPS - dropped)
        return (x * keep.to(x.dtype)).mul_(ctx.growth)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return (grad * keep.to(grad.dtype)).mul_(ctx.growth), None
