"""Linear layers whose products on a CPU are those of the faster library.

PyTorch gives fp32 products on a CPU to MKL and those in 16 bits to oneDNN. Measured on GPT-2 124M's
layers, 2 cores: on AMD (Zen 4) oneDNN is ahead in fp32 too, 1.2 to 2.5 times on 256 rows, twice on
a single row, which is what decoding is; with AVX2 alone (Zen 3) a single row, in parts, and small
weights are MKL's. On Intel (AMX) MKL is at home: there only the forward of several rows is oneDNN's
(an fp32 LoRA step is 4 % ahead of MKL alone, 17 % of oneDNN alone), and a single row is PyTorch's
matrix-vector product (a token takes 27.5 -> 22.2 ms in fp32, 20.6 -> 16.1 in bf16).
`torch.backends.mkldnn.flags(enabled=False)` brings PyTorch's own choice back.

Without AVX512 neither library has products in 16 bits, and PyTorch's own loops take 8 times as long
as fp32 forwards, 20 times backwards, but for a few rows: there they are computed in fp32 and then
rounded, as a tensor core does it (Zen 3: a step of tiny-llama in bf16 takes 5 s -> 0.4).

oneDNN compiles a product for each shape it meets and keeps 1,024 of them, so the rest of minillm
sees to it that there are few (`round_up`): batches, attention, cross_entropy. PyTorch keeps a cache
of its own in front, whose hits ask oneDNN all the same: here it holds one entry. (Measured: a tiny
model's process peaks at 224 MiB instead of 260, a step of GPT-2 at 370 instead of 376, in the same
time.)
"""

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minillm.memory import MIB, free_mib
from minillm.precision import has_native_bf16

os.environ.setdefault("LRU_CACHE_CAPACITY", "1")  # read at the first product

# what torch.compile itself calls on a CPU; PyTorch has no other door to oneDNN for dense fp32
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
# dtypes PyTorch has no fast products for on this CPU, and from how many rows on that shows
_EMULATED = {
    dtype for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
    if not getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: True)()
}  # fmt: skip
_MANY_ROWS = 32
# with AVX512 fewer rows than four take longer with packed weights than four: one of GPT-2's in fp32
# 16.4 ms for 13.4, two 21.6 for 16.8, in bf16 9.4 for 8.9 and 10.6 for 8.2 (Zen 4). With AVX2 alone
# they do not, and one row is ahead with the weights as they are
_FAST_ROWS = 4
# on AMD MKL leaves one row's product to one thread, which alone reads at half the memory's rate; of
# a batch of products each thread takes its own (Zen 3, two cores: a token of GPT-2 in fp32 takes
# 57.5 -> 48 ms, a tiny model's product 44 -> 16 us; with AVX512 not measured)
_PARTS = 8
# there MKL is ahead for several rows too where the weight has fewer numbers: than so many forwards,
# than so many backwards, which reads it across its rows (Zen 3: a LoRA step of tiny-llama takes 168
# -> 147 ms, of GPT-2 124M 1.43 -> 1.24 s; with MKL alone a layer of Llama-2-7B's takes 1.2 times)
_MKL_FORWARD, _MKL_BACKWARD = 2**18, 2**23
_HAS_AVX512 = torch.cpu._is_avx512_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. Shapes: x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    if _EMULATED and is_emulated(x, dtype := autocast_dtype(x)) and _has_many_rows(x):
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (t if t is None else t.to(dtype) for t in (x, weight, bias))
        if x.dtype == weight.dtype and (bias is None or bias.dtype == dtype):
            return _Product.apply(x, weight, bias)
    if not _has_choice(x, weight):
        return F.linear(x, weight, bias)
    if prefers_mkl() and _is_single_row(x, weight) and _reads_fast(weight):
        row = x.flatten()  # (in,)
        out = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)  # (out,)
        return out.view(*x.shape[:-1], -1)  # (..., out)
    if _is_single_row(x, weight) and _reads_by_parts(weight):
        return _row_by_parts(x, weight, bias)
    if _PRODUCT and x.dtype == torch.float32 and x.dim() > 1 and not _is_small(weight):
        return (_Product.apply if torch.is_grad_enabled() else _product)(x, weight, bias)
    return F.linear(x, weight, bias)


def round_up(n: int) -> int:
    """n rows of a product to a multiple of 16, beyond 128 to one of 32: in bf16 a CPU compiles its
    kernels anew for each number it meets and keeps them, a GPU's tensor cores want multiples of 8.
    (Measured on tiny-llama: 4 to 18 times the tokens per second.)"""
    return n + -n % (16 if n <= 128 else 32)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a product with x is computed in."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def is_emulated(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch has only slow loops for products with x, in `dtype`."""
    on_cpu = x.device.type == "cpu" and torch.backends.mkldnn.enabled
    return on_cpu and dtype in _EMULATED and not torch.compiler.is_compiling()


def _has_many_rows(x: Tensor) -> bool:
    return x.numel() >= _MANY_ROWS * max(1, x.size(-1))


def in_fp32(compute: Callable, *tensors: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """What `compute` makes of the tensors in fp32, rounded to the dtype of the first."""
    with torch.autocast("cpu", enabled=False):
        found = compute(*(t if t is None else t.float() for t in tensors))
    dtype = tensors[0].dtype
    return found.to(dtype) if isinstance(found, Tensor) else tuple(t.to(dtype) for t in found)


def _has_choice(x: Tensor, weight: Tensor) -> bool:
    """Whether more than one library could compute it: on a CPU, in the dtype both have."""
    on_cpu = x.device.type == "cpu" and torch.backends.mkldnn.enabled and x.numel() > 0
    as_is = x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
    return on_cpu and as_is and not torch.compiler.is_compiling()


@functools.cache
def prefers_mkl() -> bool:
    """Whether PyTorch has MKL and the CPU is Intel's, where MKL takes its fast paths."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()
    return "GenuineIntel" in text and torch.backends.mkl.is_available()


def _reads_fast(weight: Tensor) -> bool:
    """Whether a matrix-vector product has a kernel of its own: in bf16 small matrices, and CPUs
    without bf16, get a plain loop that rounds every product."""
    if weight.dtype == torch.bfloat16:
        return weight.numel() >= 2**16 and torch.cpu._is_avx512_bf16_supported()
    return weight.dtype == torch.float32


def _reads_by_parts(weight: Tensor) -> bool:
    """Whether a single row's product is taken in parts: fp32, MKL, AVX2 alone, not Intel's."""
    has_parts = weight.dtype == torch.float32 and len(weight) % _PARTS == 0
    return has_parts and _has_avx2_alone()


def _is_small(weight: Tensor) -> bool:
    """Whether fp32 products with several rows are left to MKL: AVX2 alone, not Intel's."""
    return weight.numel() < _MKL_FORWARD and _has_avx2_alone()


def _has_avx2_alone() -> bool:
    """Whether PyTorch has MKL on a CPU without AVX512 that is not Intel's."""
    return not (_HAS_AVX512 or prefers_mkl()) and torch.backends.mkl.is_available()


def _row_by_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of one vector, a batch of products with an eighth of W's rows each."""
    row = x.reshape(1, 1, -1).expand(_PARTS, 1, -1)  # (8, 1, in)
    parts = weight.unflatten(0, (_PARTS, len(weight) // _PARTS)).mT  # (8, in, out / 8)
    if bias is None:
        out = torch.bmm(row, parts)  # (8, 1, out / 8)
    else:
        each = bias.unflatten(0, (_PARTS, len(weight) // _PARTS))  # (8, out / 8)
        out = torch.baddbmm(each.unsqueeze(1), row, parts)
    return out.view(*x.shape[:-1], len(weight))  # (..., out)


def _is_single_row(x: Tensor, weight: Tensor) -> bool:
    """Whether x (..., in) is one vector that the weight (out, in) fits."""
    return x.numel() == x.size(-1) == weight.size(1)


class Linear(nn.Linear):
    """nn.Linear, computed by `product`."""

    product = staticmethod(linear)
    parts: tuple[str, ...] = ()  # names of the equal slices of its rows, where it is a fused layer

    @classmethod
    def sharing(cls, layer: nn.Linear) -> "Linear":
        """One with the weight and bias of another, shared and not copied, its product and parts."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.weight, new.bias = layer.weight, layer.bias
        new.product = getattr(layer, "product", F.linear)
        new.parts = getattr(layer, "parts", ())
        return new

    def reset_parameters(self) -> None:
        """nn.Linear's, but nothing on the meta device: there is nothing to draw, and PyTorch would
        import its compiler for it (820 modules, 70 MiB, a second)."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


def is_plain(module: nn.Module) -> bool:
    """Whether it is a linear layer with nothing added to it."""
    return type(module) in (nn.Linear, Linear)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # a frozen weight needs no input for its gradient, a frozen input no weight
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None,
                              weight if ctx.needs_input_grad[0] else None)  # fmt: skip
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (N, out)
        dx = None if weight is None else matmul(rows, weight).view(*grad.shape[:-1], -1)
        dw = None if x is None else matmul(rows.t(), x.flatten(0, -2))  # (out, in)
        return dx, dw, rows.sum(0) if ctx.needs_input_grad[2] else None


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b of two matrices, without autograd."""
    if is_emulated(a, a.dtype):
        return in_fp32(matmul, a, b)
    if a.dtype != torch.float32 or not _PRODUCT or not _has_choice(a, b) or prefers_mkl():
        return a @ b
    size = max(len(a), len(b)) * b.size(1)  # of the weight that is read, or of its gradient
    is_mkls = size < _MKL_BACKWARD and _has_avx2_alone()
    return a @ b if is_mkls else _product(a, b.t())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if is_emulated(x, x.dtype):
        return in_fp32(linear, x, weight, bias)
    return _PRODUCT(x, weight, bias, "none", [], "")


def pack_weights(model: nn.Module) -> None:
    """Has the model compute, until `unpack_weights`, with copies of its weights in oneDNN's own
    layout: a product of a few rows otherwise spends most of its time on bringing them there. On a
    CPU that has room for the copies, nothing elsewhere; in bf16 the same bits.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or prefers_mkl() or not (_PRODUCT and _PACK):
        return
    if 2 * sum(p.nbytes for p in model.parameters()) > free_mib(weight.device) * MIB:
        return
    for module in model.modules():
        if hasattr(module, "product") and not isinstance(module.product, _Packed):
            module.product = _Packed(module.product)


def unpack_weights(model: nn.Module) -> None:
    """Takes the copies away. Once or twice is the same."""
    for module in model.modules():
        if isinstance(getattr(module, "product", None), _Packed):
            module.product = module.product.plain


class _Packed:
    """A product with a copy of the first weight it meets. What the copy does not fit, another
    weight, another dtype, gradients, is computed as before."""

    def __init__(self, plain: Callable[..., Tensor]):
        self.plain = plain
        self.weight = self.version = self.copy = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or x.dim() < 2 or not _has_choice(x, weight):
            return self.plain(x, weight, bias)
        if _is_single_row(x, weight) and not _HAS_AVX512:
            return self.plain(x, weight, bias)
        if self.copy is None and _is_packable(weight):
            self.weight, self.version, self.copy = weight, weight._version, _PACK(weight.detach())
        if weight is not self.weight or weight._version != self.version:
            return self.plain(x, weight, bias)
        rows = x.flatten(0, -2)  # (N, in)
        n = len(rows)
        if n < _FAST_ROWS and _HAS_AVX512:
            rows = F.pad(rows, (0, 0, 0, _FAST_ROWS - n))
        return _product(rows, self.copy, bias)[:n].view(*x.shape[:-1], -1)  # (..., out)


def _is_packable(weight: Tensor) -> bool:
    if weight.is_inference():  # nothing would tell of a change to it
        return False
    native = weight.dtype == torch.bfloat16 and has_native_bf16(weight.device)
    return native or (weight.dtype == torch.float32 and not _is_small(weight))
