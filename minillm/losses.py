"""Objectives: each maps (model, batch) to a summed loss and the number of its terms.

Sums, not means: the loop divides by the count of the whole optimizer step, so that a row with
10 targets beside one with 190 weighs 5 %, however the step is cut into micro-batches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORED = -100  # label of a position without supervision, PyTorch's own default


def token_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every labelled token given all tokens before it, summed, in nats.

    Shapes: batch = (tokens (B, T), labels (B, T), ...) with labels[t] the token at t or -100; the
    one shift happens here. Returns (loss sum, number of labelled tokens), both scalars. Only the N
    positions that predict a labelled token meet the vocabulary matrix.
    """
    targets, where = supervision(batch)
    logits = model(batch[0][:, :-1], **where)  # (N, V)
    return cross_entropy(logits, targets).sum(), where["logits_at"].sum()


def sequence_logprobs(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Log-probability of each row's labelled tokens given all before them, summed, in nats.

    Shapes: batch as for token_loss -> (B,) fp32, 0 for a row without labels.
    """
    assert getattr(batch, "segments", None) is None, "packed: these rows are one"
    targets, where = supervision(batch)
    losses = cross_entropy(model(batch[0][:, :-1], **where), targets)  # (N,)
    rows = where["logits_at"].nonzero()[:, 0]  # (N,): the row each label is in
    return -losses.new_zeros(len(batch[0])).index_add(0, rows, losses)


def supervision(batch: tuple[Tensor, ...]) -> tuple[Tensor, dict]:
    """The N labelled tokens (N,), and what the model is told beside the tokens: which positions
    predict them, (B, T-1) bool, and, of a packed batch, where its texts stand."""
    targets = batch[1][:, 1:]  # (B, T-1): position t predicts token t + 1
    at = targets != IGNORED
    segments = getattr(batch, "segments", None)
    packed = {} if segments is None else {"segments": segments}
    return targets[at], {"logits_at": at, **packed}


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
                  for part, target in zip(*_slices(logits, targets), strict=True)]  # fmt: skip
        losses = torch.cat(losses)  # (N,)
        ctx.save_for_backward(logits, targets, losses)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, losses = ctx.saved_tensors
        columns = (x[:, None] for x in (targets, losses, grad))
        for part, target, loss, g in zip(*_slices(logits, *columns), strict=True):
            slope = part.to(grad.dtype)  # (rows, V)
            # p = p(target) e^(z - z(target)): two small numbers to round, where the logarithm of
            # the row's sum is a large one
            slope.sub_(slope.gather(-1, target)).sub_(loss).exp_()
            slope.scatter_(-1, target, torch.expm1(-loss))
            part.copy_(slope.mul_(g))
        return logits, None


def _slices(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Rows, a few at a time: on a CPU as many as stay in its cache."""
    return [tensor.split(16 if tensor.device.type == "cpu" else 512) for tensor in tensors]
