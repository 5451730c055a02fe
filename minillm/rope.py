"""Rotary positions: the angles. Which numbers a model pairs up is its own.

Source: Su et al. 2021.
"""

import torch
from torch import Tensor


def rope_table(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle position * theta^(-2j/R) of each of R/2 pairs j, always in fp32.

    Shapes: positions (1 or B, T), width R -> two (1 or B, 1, T, R/2), broadcast over heads.
    """
    pairs = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    frequencies = theta ** (-pairs / width)  # (R/2,)
    angles = positions[:, None, :, None] * frequencies  # (B, 1, T, R/2)
    return angles.cos(), angles.sin()
