"""Attention by PyTorch's fused kernel, and, for training in 16 bits on a CPU, that kernel forwards
with explicit products backwards.

Legend: as attention.py's, where all of it is spelled out.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.linear import in_fp32, is_emulated, round_up
from minillm.precision import has_native_bf16

# On an H100 or newer PyTorch's first choice is cuDNN's kernel, which plans anew for each length it
# meets, 1.2 ms of the CPU's time: a token of Llama-2-7B took 50 ms of which the GPU worked 5.
torch.backends.cuda.enable_cudnn_sdp(False)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """The faster way to what attention.py's explicit one gives. Shapes: as causal_attention's,
    without segments; returns (B, H, T, Dh)."""
    if _is_slow_backwards(q, k, dropout):
        return _FusedForward.apply(q, k, v, mask)
    return _fused(q, k, v, mask, dropout)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    n_new = q.size(2)
    causal = mask is None and n_new > 1
    if _is_slow_alone(q):
        q = F.pad(q, (0, 0, 0, 1))  # (B, H, 2, Dh)
    if q.is_cuda and not _flash_takes(q, mask):  # other fused kernels take no grouped heads
        k, v = repeat_kv(k, q), repeat_kv(v, q)
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


def _flash_takes(q: Tensor, mask: Tensor | None) -> bool:
    """Whether a GPU's flash attention takes it: no mask, 16 bits, capability 8.0 or more."""
    return mask is None and q.dtype.itemsize == 2 and has_native_bf16(q.device)


def repeat_kv(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values (B, K, S, Dh), each repeated for the query heads that share it."""
    return x if x.size(1) == q.size(1) else x.repeat_interleave(q.size(1) // x.size(1), dim=1)


def additive_mask(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """What scores are raised by, (T, S) or (B, 1, T, S): 0 where a query attends, else -inf."""
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
        mask_bias = additive_mask(q, k, mask)  # (T, S) or (B, 1, T, S)
        n_heads = mask_bias.size(-3) if mask_bias.dim() > 2 else 1
        mask_bias = mask_bias.expand(len(q), n_heads, -1, -1)
        n = max(1, 2**20 // max(1, q.size(1) * q.size(2) * k.size(2)))  # texts at a time
        parts = zip(*(x.split(n) for x in (q, k, v, mask_bias, grad)), strict=True)
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
    q: Tensor, k: Tensor, v: Tensor, mask_bias: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Of q, k and v, where `grad` (B, H, T, Dh) is that of the output."""
    if is_emulated(q, q.dtype):
        return in_fp32(_explicit_gradients, q, k, v, mask_bias, grad)
    n_keys, scale = k.size(1), 1 / math.sqrt(q.size(-1))
    k, v, q = repeat_kv(k, q), repeat_kv(v, q), q * scale  # (B, H, S or T, Dh)
    weights = torch.softmax((q @ k.transpose(-2, -1)).add_(mask_bias), -1)  # (B, H, T, S)
    dv = weights.transpose(-2, -1) @ grad
    ds = grad @ v.transpose(-2, -1)  # of the weights, then of the scores
    ds = torch.ops.aten._softmax_backward_data(ds, weights, -1, weights.dtype)
    dq, dk = ds @ k * scale, ds.transpose(-2, -1) @ q
    if n_keys < q.size(1):
        dk, dv = (x.unflatten(1, (n_keys, -1)).sum(2) for x in (dk, dv))  # (B, K, S, Dh)
    return dq, dk, dv
