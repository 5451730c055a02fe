"""Scaled dot-product attention: PyTorch's fused kernel, or the same thing spelled out.

Legend: B batch, T new tokens, S cached + new positions, H query heads, K key/value heads,
Dh width of one head. Source: Vaswani et al. 2017, equation 1; grouped heads: Ainslie et al. 2023.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, mode: str) -> Tensor:
    """Weighted sum of the values each query may see: softmax(q k^T / sqrt(Dh) + mask) v.

    Shapes: q (B, H, T, Dh); k, v (B, K, S, Dh) with K a divisor of H; mask bool, broadcastable to
    (B, H, T, S), True = may look. mask None means plain causal when T == S, and a single query
    that sees everything when T == 1. Returns (B, T, H * Dh), ready for the output projection.
    """
    if mode == "sdpa":
        causal = mask is None and q.size(2) > 1
        grouped = q.size(1) != k.size(1)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    else:
        assert mode == "explicit", f"attention is {mode!r}; choose sdpa or explicit"
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # (B, H, S, Dh)
        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)  # (B, H, S, Dh)
        if mask is None:
            mask = causal_mask(k.size(2) - q.size(2), q.size(2), q.device)
        scores = q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)  # (B, H, T, S)
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = torch.softmax(scores, -1)  # sums in fp32 inside, also of 16-bit scores
        out = weights.to(v.dtype) @ v  # (B, H, T, Dh)
    return out.transpose(1, 2).flatten(2)  # (B, T, H * Dh)


def causal_mask(start: int, n_new: int, device: torch.device) -> Tensor:
    """(T, S) bool: new token t, at column start + t, sees the columns up to itself."""
    return torch.ones(n_new, start + n_new, dtype=torch.bool, device=device).tril(start)


def attention_mask(
    start: int, n_new: int, left_pad: Tensor | None, n_prefix: int, device: torch.device
) -> Tensor | None:
    """Which of the S = start + T columns each of the T new ones may see; None if plain causal.

    The columns are [n_prefix virtual ones][left_pad[b] paddings][tokens]: virtual columns (a soft
    prompt or learned prefix) are always visible, paddings never. With a cache, S > T: row t of
    the mask stands for column start + t, hence `tril(start)` and not the square triangle.
    A padding sees itself, because a softmax over nothing is NaN and NaN x 0 is NaN.

    Shapes: left_pad (B,) int64. Returns (T, S), or (B, 1, T, S) with left_pad, or None.
    """
    if left_pad is None:
        plain = n_new == 1 or start == 0
        return None if plain else causal_mask(start, n_new, device)
    mask = causal_mask(start, n_new, device)  # (T, S)
    columns = torch.arange(start + n_new, device=device)
    is_padding = (columns >= n_prefix) & (columns < n_prefix + left_pad[:, None])  # (B, S)
    is_self = columns == columns[start:, None]  # (T, S)
    return (mask & (~is_padding[:, None] | is_self))[:, None]  # (B, 1, T, S)


def positions(
    start: int, n_new: int, left_pad: Tensor | None, n_prefix: int, device: torch.device
) -> Tensor:
    """Position of each new column in its own sequence, so that a padded row counts from its start.

    Shapes: left_pad (B,). Returns int64 (1, T), or (B, T) with left_pad; paddings get a harmless
    position that no visible token uses the value of.
    """
    columns = torch.arange(start, start + n_new, device=device)[None]  # (1, T)
    if left_pad is None:
        return columns
    shifted = (columns - left_pad[:, None]).clamp(min=n_prefix)  # (B, T)
    return torch.where(columns < n_prefix, columns, shifted)
