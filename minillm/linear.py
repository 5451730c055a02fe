"""Linear layers whose products on a CPU are those of the faster library.

PyTorch gives fp32 products on a CPU to MKL and those in 16 bits to oneDNN. Measured on GPT-2 124M's
layers, 2 cores: on AMD (Zen 4) oneDNN is ahead in fp32 too, 1.2 to 2.5 times on 256 rows, twice on
a single row, which is what decoding is. On Intel (AMX) MKL is at home: there only the forward of
several rows is oneDNN's (an fp32 LoRA step is 4 % ahead of MKL alone, 17 % of oneDNN alone), and a
single row is PyTorch's matrix-vector product (a token takes 27.5 -> 22.2 ms in fp32, 20.6 -> 16.1
in bf16). `torch.backends.mkldnn.flags(enabled=False)` brings PyTorch's own choice back.

oneDNN keeps a compiled product for each of the last 1,024 shapes it met, and texts of any length
mean shapes without end: some MiB apiece for large matrices. Here it keeps 64. (Measured: a tiny
model's process peaks at 257 MiB instead of 610, and takes 10 to 20 % longer; one layer of
Llama-2-7B's size at 1,334 MiB instead of 1,556 and rising after 8 steps, in the same time.) Set
these variables yourself to keep more.
"""

import functools
import os
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minillm.errors import UserError

# read at the first product; PyTorch has a cache of its own in front of oneDNN's
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")

# what torch.compile itself calls on a CPU; PyTorch has no other door to oneDNN for dense fp32
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. Shapes: x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    on_cpu = x.device.type == "cpu" and torch.backends.mkldnn.enabled and x.numel() > 0
    as_is = x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
    if not (on_cpu and as_is) or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if prefers_mkl() and is_single_row(x, weight) and _reads_fast(weight):
        row = x.flatten()  # (in,)
        out = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)  # (out,)
        return out.view(*x.shape[:-1], -1)  # (..., out)
    if _PRODUCT and x.dtype == torch.float32 and x.dim() > 1:
        return _OneDNN.apply(x, weight, bias)
    return F.linear(x, weight, bias)


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


def is_single_row(x: Tensor, weight: Tensor) -> bool:
    """Whether x (..., in) is one vector that the weight (out, in) fits."""
    return x.numel() == x.size(-1) == weight.size(1)


class Linear(nn.Linear):
    """nn.Linear, computed by `product`."""

    product = staticmethod(linear)

    def reset_parameters(self) -> None:
        """nn.Linear's, but nothing on the meta device: there is nothing to draw, and PyTorch would
        import its compiler for it (800 modules, 70 MiB, a second)."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


def is_plain(module: nn.Module) -> bool:
    """Whether it is a linear layer with nothing added to it."""
    return type(module) in (nn.Linear, Linear)


class _OneDNN(torch.autograd.Function):
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
        dx = None if weight is None else _times(rows, weight).view(*grad.shape[:-1], -1)
        dw = None if x is None else _times(rows.t(), x.flatten(0, -2))  # (out, in)
        return dx, dw, rows.sum(0) if ctx.needs_input_grad[2] else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _PRODUCT(x, weight, bias, "none", [], "")


def _times(a: Tensor, b: Tensor) -> Tensor:
    return a @ b if prefers_mkl() else _product(a, b.t())


def compile_single_rows(model: nn.Module) -> None:
    """Has the products of a single row, which decoding is made of, compiled for the model's shapes:
    they then read the weights in one pass. For a CPU, where nothing needs a gradient; all other
    products stay as they are.

    Takes seconds, fewer the next time. Errors: UserError without a C++ compiler, or on a GPU.
    """
    if next(model.parameters()).device.type != "cpu":
        raise UserError("--compile: compiles a CPU's products of one row; leave it out on a GPU")
    for module in model.modules():
        if hasattr(module, "product"):
            module.product = single_row
    try:
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"--compile: {reason}; install g++, or leave it out") from None


def single_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear`, compiled where x is one row on a CPU that no gradient goes through, and that has
    nothing faster."""
    is_fast = prefers_mkl() and _reads_fast(weight)  # measured: a quarter ahead of the compiled one
    if is_fast or not is_single_row(x, weight) or x.device.type != "cpu" or torch.is_grad_enabled():
        return linear(x, weight, bias)
    bias = bias if bias is None else bias.detach()
    return _compiled()(x.flatten(), weight.detach(), bias).view(*x.shape[:-1], -1)  # (..., out)


@functools.cache
def _compiled():
    return torch.compile(_dot, dynamic=True)  # once for all sizes


def _dot(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    out = (weight.to(wide) * x.to(wide)).sum(-1)  # (out,): one pass over the weights
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)
