"""Cross-entropy of a vocabulary's logits at little memory: of whole logits, which become their own
gradient, and of a frozen head's, which never exist as a whole.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minillm.linear import autocast_dtype, is_plain, linear, matmul


def head_cross_entropy(x: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """cross_entropy of the logits that a head (a projection, or a tied embedding) makes of x.

    Shapes: x (N, D), targets (N,) int64 -> (N,).
    """
    n, filler = len(x), -len(x) % 32  # coarser than `round_up`: every step has another N
    x, targets = F.pad(x, (0, 0, 0, filler)), F.pad(targets, (0, filler))  # rows of zeros
    if is_frozen_head(head):
        return cut_cross_entropy(x, head, targets)[:n]
    logits = linear(x, head.weight) if isinstance(head, nn.Embedding) else head(x)  # (N + pad, V)
    return cross_entropy(logits, targets)[:n]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each row in fp32 (or better), at the memory of one (N, V).

    PyTorch's own keeps the logits in fp32, their log-softmax and two gradients of that size; here
    backward turns the logits into their gradient in place, a few rows at a time, so nothing may
    read them after it. The targets' logits must be finite.

    Shapes: logits (N, V), targets (N,) int64 -> (N,).
    """
    return _CrossEntropy.apply(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = [F.cross_entropy(part.to(wide), target, reduction="none")
                  for part, target in zip(*_rows(logits, targets), strict=True)]  # fmt: skip
        losses = torch.cat(losses)  # (N,)
        ctx.save_for_backward(logits, targets, losses)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, losses = ctx.saved_tensors
        columns = (x[:, None] for x in (targets, losses, grad))
        for part, target, loss, g in zip(*_rows(logits, *columns), strict=True):
            dz = part.to(grad.dtype)  # (rows, V)
            # p = p(target) e^(z - z(target)): two small numbers to round, where the logarithm of
            # the row's sum is a large one
            dz.sub_(dz.gather(-1, target)).sub_(loss).exp_()
            dz.scatter_(-1, target, torch.expm1(-loss))
            part.copy_(dz.mul_(g))
        return logits, None


def _rows(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Rows, a few at a time: on a CPU as many as stay in its cache."""
    return [tensor.split(16 if tensor.device.type == "cpu" else 512) for tensor in tensors]


def is_frozen_head(head: nn.Module) -> bool:
    """Whether `cut_cross_entropy` fits: a plain projection, or a tied embedding, that is not
    trained."""
    known = isinstance(head, nn.Embedding) or is_plain(head)
    return known and not any(p.requires_grad for p in head.parameters())


def cut_cross_entropy(x: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """cross_entropy of a frozen head's logits z = x W^T + b, of which only a slice of the
    vocabulary exists at a time.

    It is attention of x over the vocabulary, with the rows of W as keys and as values:
    d loss / d x = sum_v softmax(z)_v W_v - W_target. So forward computes the gradient with the
    loss, slice by slice, as flash attention does, and backward has nothing left to do but scale it.

    Shapes: x (N, D), head.weight (V, D), targets (N,) int64 -> (N,). Sources: Wijmans et al. 2025
    (cut cross-entropy; theirs computes the logits twice), Milakov & Gimelshein 2018 (the softmax
    of a row that comes in slices).
    """
    assert is_frozen_head(head), "the head is trained: it needs cross_entropy, of its logits"
    return _CutCrossEntropy.apply(x, head.weight, getattr(head, "bias", None), targets[:, None])


class _CutCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        dtype, wide = autocast_dtype(x), torch.promote_types(x.dtype, torch.float32)
        rows, column = x.to(dtype), targets  # (N, D); the target's column in the slice, (N, 1)
        # (N, 1): the largest logit so far, the sum of e^(z - running_max)
        running_max = x.new_full(targets.shape, float("-inf"), dtype=wide)
        total = torch.zeros_like(running_max)
        z_target = torch.full_like(total, float("nan"))  # stays so for no token
        # (N, D): the sum of e^(z - running_max) W, without the target's
        weighted_sum = torch.zeros_like(x, dtype=wide)
        width = _slice_width(rows, len(weight))
        parts = weight.split(width)
        biases = [None] * len(parts) if bias is None else bias.split(width)
        for part, b in zip(parts, biases, strict=True):
            part = part.to(dtype)  # (v, D)
            z = linear(rows, part, None if b is None else b.to(dtype))  # (N, v)
            p = z.to(wide)
            at, here = column.clamp(0, len(part) - 1), (column >= 0) & (column < len(part))
            z_target = torch.where(here, p.gather(1, at), z_target)
            high = p.amax(1, keepdim=True)
            torch.softmax(p, 1, out=p)
            new_max = torch.maximum(running_max, high)
            rescale = torch.exp(running_max - new_max)  # of what was summed so far
            # the slice's sum of e^(z - new_max): its largest p is 1 / sum of e^(z - high)
            share = torch.exp(high - new_max) / p.amax(1, keepdim=True)
            total = total * rescale + share
            if ctx.needs_input_grad[0]:
                p.scatter_(1, at, p.gather(1, at).masked_fill(here, 0))
                weighted_sum.mul_(rescale).addcmul_(share, matmul(z.copy_(p), part))
            running_max, column = new_max, column - len(part)
        losses = (running_max - z_target) + total.log()  # (N, 1)
        if ctx.needs_input_grad[0]:
            # p(target) - 1, as exact as the loss where the model is sure
            own = torch.expm1(-losses) * F.embedding(targets[:, 0], weight)
            ctx.save_for_backward(weighted_sum.div_(total).add_(own))
            ctx.dtype = x.dtype
        return losses[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        return (dx * grad[:, None]).to(ctx.dtype), None, None, None


def _slice_width(x: Tensor, n: int) -> int:
    """Columns of a slice of n: fewer than 1,024 make slow products; of more, what keeps a slice in
    fp32 at 2 MiB on a CPU (its cache), 64 MiB on a GPU (where more rows are products enough).
    Somewhat less where that makes all slices equal: oneDNN compiles a product for every shape."""
    most = max(1024, (2**19 if x.device.type == "cpu" else 2**24) // max(1, len(x)))
    fewest = math.ceil(n / most)
    count = next((k for k in range(fewest, 2 * fewest) if n % k == 0), fewest)
    return math.ceil(n / count)
