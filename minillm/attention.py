"""Scaled dot-product attention: PyTorch's fused kernel, that kernel with explicit products for
its backward (16 bits on a CPU), or all of it spelled out.

Legend: B batch, T new tokens, S cached + new positions, H query heads, K key/value heads,
Dh width of one head. Source: Vaswani et al. 2017, equation 1; grouped heads: Ainslie et al. 2023.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.cache import KVCache
from minillm.errors import UserError
from minillm.linear import round_up
from minillm.precision import has_native_bf16

# On an H100 or newer PyTorch's first choice is cuDNN's kernel, which plans anew for each length it
# meets, 1.2 ms of the CPU's time: a token of Llama-2-7B took 50 ms of which the GPU worked 5.
torch.backends.cuda.enable_cudnn_sdp(False)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | list[int] | None, mode: str,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Weighted sum of the values each query may see: softmax(q k^T / sqrt(Dh) + mask) v.

    Shapes: q (B, H, T, Dh); k, v (B, K, S, Dh) with K a divisor of H; mask bool, broadcastable to
    (B, H, T, S), True = may look. mask None means plain causal when T == S, and a single query
    that sees everything when T == 1; a list of lengths, plain causal within each of these segments
    of T = S columns. `dropout` is the share of weights set to zero (the others grow to match).
    Returns (B, T, H * Dh), ready for the output projection.
    """
    if isinstance(mask, list):
        segments = zip(*(x.split(mask, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*qkv, None, mode, dropout) for qkv in segments], 1)
    if mode == "sdpa" and _is_slow_backwards(q, k, dropout):
        out = _FusedForward.apply(q, k, v, mask)
    elif mode == "sdpa":
        out = _fused(q, k, v, mask, dropout)
    else:
        assert mode == "explicit", f"attention is {mode!r}; choose sdpa or explicit"
        k, v = _for_every_head(k, q), _for_every_head(v, q)  # (B, H, S, Dh)
        hidden = _hidden_columns(q, k, mask)
        scores = q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)  # (B, H, T, S)
        scores = scores + hidden  # a sum needs nothing in backward, filling in would
        weights = torch.softmax(scores, -1)  # sums in fp32 inside, also of 16-bit scores
        out = F.dropout(weights.to(v.dtype), dropout) @ v  # (B, H, T, Dh)
    return out.transpose(1, 2).flatten(2)  # (B, T, H * Dh)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    n_new = q.size(2)
    causal = mask is None and n_new > 1
    if _is_slow_alone(q):
        q = F.pad(q, (0, 0, 0, 1))  # (B, H, 2, Dh)
    if q.is_cuda and not _is_flashs(q, mask):  # other fused kernels take no grouped heads
        k, v = _for_every_head(k, q), _for_every_head(v, q)
    grouped = q.size(1) != k.size(1)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal, enable_gqa=grouped
    )
    return out[:, :, :n_new]  # (B, H, T, Dh)


def _is_slow_alone(q: Tensor) -> bool:
    """Whether the fused kernel takes longer over one query than over two: in bf16 on a CPU, two to
    three times (GPT-2's heads over 512 columns: 389 us a layer and 154)."""
    one_in_bf16 = q.size(2) == 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu"
    return one_in_bf16 and not torch.compiler.is_compiling() and has_native_bf16(q.device)


def _is_flashs(q: Tensor, mask: Tensor | None) -> bool:
    """Whether a GPU's flash attention takes it: no mask, 16 bits, capability 8.0 or more."""
    return mask is None and q.dtype.itemsize == 2 and has_native_bf16(q.device)


def _for_every_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values (B, K, S, Dh), each repeated for the query heads that share it."""
    return x if x.size(1) == q.size(1) else x.repeat_interleave(q.size(1) // x.size(1), dim=1)


def _hidden_columns(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """What scores are raised by, (T, S) or (B, 1, T, S): 0 where a query may look, else -inf."""
    if mask is None:
        n_new, n_columns = q.size(2), k.size(2)
        return q.new_full((n_new, n_columns), float("-inf")).triu(n_columns - n_new + 1)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))


def _is_slow_backwards(q: Tensor, k: Tensor, dropout: float) -> bool:
    """Whether the fused kernel's backward is slower than the products spelled out: on a CPU in 16
    bits, where the weights of a head are small (forward and backward of GPT-2 124M's attention at
    256 columns take 3.7 -> 2.7 ms, at 512 9.5 -> 8.3, at 1,024 25.6 -> 34)."""
    on_cpu = q.device.type == "cpu" and q.dtype.itemsize == 2 and torch.is_grad_enabled()
    return on_cpu and dropout == 0 and k.size(2) <= 512


class _FusedForward(torch.autograd.Function):
    """The fused kernel forwards, the explicit products backwards, where the weights are computed
    again: of (B, H, T, S) nothing is kept, and a million numbers of it, or one text's, exist at a
    time. The gradients are those of the explicit path."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        n_new = q.size(2)
        return _fused(*_pad_columns(q, k, v, mask), mask)[:, :, :n_new]  # (B, H, T, Dh)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        n_new, n_columns = q.size(2), k.size(2)
        q, k, v, grad = _pad_columns(q, k, v, mask, grad)
        hidden = _hidden_columns(q, k, mask)  # (T, S) or (B, 1, T, S)
        hidden = hidden.expand(len(q), 1, -1, -1)
        n = max(1, 2**20 // max(1, q.size(1) * q.size(2) * k.size(2)))  # texts at a time
        parts = zip(*(x.split(n) for x in (q, k, v, hidden, grad)), strict=True)
        found = [_explicit_gradients(*part) for part in parts]
        dq, dk, dv = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        return dq[:, :, :n_new], dk[:, :, :n_columns], dv[:, :, :n_columns], None


def _pad_columns(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *like_q: Tensor
) -> tuple[Tensor, ...]:
    """q, k, v and what has q's shape with zeros behind their columns, so that packed texts, which
    come in every length, mean few shapes of products. Only where no query sees what comes after
    it: plain causal attention. (A layer of Llama-2-7B: 1.8 -> 1.5 GiB, in the same time.)"""
    n = q.size(2)
    filler = round_up(n) - n if mask is None and n == k.size(2) else 0
    tensors = (q, k, v, *like_q)
    return tuple(F.pad(x, (0, 0, 0, filler)) for x in tensors) if filler else tensors


def _explicit_gradients(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Of q, k and v, where `grad` (B, H, T, Dh) is that of the output."""
    n_keys, scale = k.size(1), 1 / math.sqrt(q.size(-1))
    k, v, q = _for_every_head(k, q), _for_every_head(v, q), q * scale  # (B, H, S or T, Dh)
    weights = torch.softmax((q @ k.transpose(-2, -1)).add_(hidden), -1)  # (B, H, T, S)
    dv = weights.transpose(-2, -1) @ grad
    slope = grad @ v.transpose(-2, -1)  # of the weights, then of the scores
    slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
    dq, dk = slope @ k * scale, slope.transpose(-2, -1) @ q
    if n_keys < q.size(1):
        dk, dv = (x.unflatten(1, (n_keys, -1)).sum(2) for x in (dk, dv))  # (B, K, S, Dh)
    return dq, dk, dv


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
    start, n_prefix = (0, n_prompt) if cache is None else (cache.length, cache.n_prefix + n_prompt)
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
