"""Scaled dot-product attention, spelled out or by a fused kernel, and which column sees which.

Legend: B batch, T new tokens, S cached + new positions, H query heads, K key/value heads,
Dh width of one head. Source: Vaswani et al. 2017, equation 1; grouped heads: Ainslie et al. 2023.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.cache import KVCache
from minillm.errors import UserError
from minillm.fused_attention import additive_mask, fused_attention, repeat_kv


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | list[int] | None, mode: str,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Weighted sum of the values each query may see: softmax(q k^T / sqrt(Dh) + mask) v.

    Shapes: q (B, H, T, Dh); k, v (B, K, S, Dh) with K a divisor of H; mask bool, broadcastable to
    (B, H, T, S), True = attend. mask None means plain causal when T == S, and a single query
    that sees everything when T == 1; a list of lengths, plain causal within each of these segments
    of T = S columns. `dropout` is the share of weights set to zero (the others grow to match).
    Returns (B, T, H * Dh), ready for the output projection.
    """
    if isinstance(mask, list):
        segments = zip(*(x.split(mask, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*qkv, None, mode, dropout) for qkv in segments], 1)
    if mode == "sdpa":
        out = fused_attention(q, k, v, mask, dropout)  # (B, H, T, Dh)
    else:
        assert mode == "explicit", f"attention is {mode!r}; choose sdpa or explicit"
        k, v = repeat_kv(k, q), repeat_kv(v, q)  # (B, H, S, Dh)
        mask_bias = additive_mask(q, k, mask)
        scores = q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)  # (B, H, T, S)
        scores = scores + mask_bias  # masked_fill would keep its mask for backward
        weights = torch.softmax(scores, -1)  # accumulates in fp32, even for 16-bit scores
        weights = weights.to(v.dtype)  # under autocast the softmax is fp32
        out = F.dropout(weights, dropout) @ v  # (B, H, T, Dh)
    return out.transpose(1, 2).flatten(2)  # (B, T, H * Dh)


class Columns(NamedTuple):
    """Where the new columns of a forward stand: their positions (1 or B, P + T), which columns
    they may see (attention_mask, or segments that each see themselves), and how many of them, P,
    are a soft prompt's."""

    positions: Tensor
    mask: Tensor | list[int] | None
    n_prompt: int


def lay_out(
    x: Tensor, prompt: Tensor | None, cache: KVCache | None, left_pad: Tensor | None,
    max_seq_len: int, segments: list[int] | None = None,
) -> tuple[Tensor, Columns]:  # fmt: skip
    """Puts the soft prompt before the token embeddings and tells where each column stands.

    Shapes: x (B, T, D), prompt (P, D), left_pad (B,) -> x (B, P + T, D) and its Columns.
    Errors: UserError when cached and new columns together, or a segment, exceed `max_seq_len`; for
    segments beside a prompt, a cache or left_pad.
    """
    if segments is not None:
        if not (prompt is None and cache is None and left_pad is None):
            raise UserError(
                "packed samples go with no soft prompt, prefix, cache or left padding; leave out "
                "--pack"
            )
        _check_room(max(segments), max_seq_len)
        place = torch.cat([torch.arange(n, device=x.device) for n in segments])  # (T,)
        return x, Columns(place[None], segments, 0)
    if prompt is not None:
        soft = prompt.to(x.dtype).expand(x.size(0), -1, -1)  # (B, P, D)
        x = torch.cat((soft, x), dim=1)  # (B, P + T, D)
    n_prompt = 0 if prompt is None else prompt.size(0)
    start = 0 if cache is None else cache.length
    n_prefix = n_prompt if cache is None else n_prompt + cache.n_prefix
    n_new = x.size(1)
    _check_room(start + n_new, max_seq_len)
    place = positions(start, n_new, left_pad, n_prefix, x.device)  # (1 or B, P + T)
    mask = attention_mask(start, n_new, left_pad, n_prefix, x.device)
    return x, Columns(place, mask, n_prompt)


def _check_room(n: int, max_seq_len: int) -> None:
    if n > max_seq_len:
        raise UserError(
            f"{n} tokens do not fit the model's context of {max_seq_len}; shorten the text"
        )


def attention_mask(
    start: int, n_new: int, left_pad: Tensor | None, n_prefix: int, device: torch.device
) -> Tensor | None:
    """Which of the S = start + T columns each of the T new ones may see; None if plain causal.

    The columns are [n_prefix virtual ones][left_pad[b] paddings][tokens]: virtual columns (a soft
    prompt or learned prefix) are always visible, paddings never. With a cache, S > T: row t of
    the mask stands for column start + t, hence `tril(start)` and not the square triangle.
    A padding token attends to itself, because a softmax over nothing is NaN and NaN x 0 is NaN.

    Shapes: left_pad (B,) int64. Returns (T, S), or (B, 1, T, S) with left_pad, or None.
    """
    if left_pad is None and (n_new == 1 or start == 0):
        return None
    mask = torch.ones(n_new, start + n_new, dtype=torch.bool, device=device).tril(start)  # (T, S)
    if left_pad is None:
        return mask
    columns = torch.arange(start + n_new, device=device)
    is_padding = (columns >= n_prefix) & (columns < n_prefix + left_pad[:, None])  # (B, S)
    is_self = columns == columns[start:, None]  # (T, S)
    return (mask & (~is_padding[:, None] | is_self))[:, None]  # (B, 1, T, S)


def positions(
    start: int, n_new: int, left_pad: Tensor | None, n_prefix: int, device: torch.device
) -> Tensor:
    """Position of each new column in its own sequence, so that a padded row counts from its start.

    Shapes: left_pad (B,). Returns int64 (1, T), or (B, T) with left_pad; padding gets any valid
    position, as no other token attends to it.
    """
    columns = torch.arange(start, start + n_new, device=device)[None]  # (1, T)
    if left_pad is None:
        return columns
    shifted = (columns - left_pad[:, None]).clamp(min=n_prefix)  # (B, T)
    return torch.where(columns < n_prefix, columns, shifted)
