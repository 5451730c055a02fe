"""LayerNorm in the dtype of its input, whatever autocast would do."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn


def without_autocast(x: Tensor):
    """A context for a norm: a GPU's autocast would upcast x to fp32, keep the copy for backward and
    return fp32. (The kernels compute the mean in fp32 by themselves.)"""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias. Keeps shape and dtype."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return super().forward(x)
