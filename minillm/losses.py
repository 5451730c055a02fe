"""Objectives: each maps (model, batch) to a summed loss and the number of its terms.

Sums, not means: the loop divides by the count of the whole optimizer step, so that a row with
10 targets beside one with 190 weighs 5 %, however the step is cut into micro-batches.
"""

import torch
from torch import Tensor, nn

from minillm.cross_entropy import cross_entropy

IGNORED = -100  # label of a position without supervision, PyTorch's own default


def token_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every labelled token given all tokens before it, summed, in nats.

    Shapes: batch = (tokens (B, T), labels (B, T), ...) with labels[t] the token at t or -100; the
    one shift happens here. Returns (loss sum, number of labelled tokens), both scalars. Only the N
    positions that predict a labelled token meet the vocabulary matrix.
    """
    targets, where = supervision(model, batch)
    out = model(batch[0][:, :-1], **where)
    return to_losses(out, targets).sum(), torch.tensor(len(targets))  # known to the CPU already


def sequence_logprobs(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Log-probability of each row's labelled tokens given all before them, summed, in nats.

    Shapes: batch as for token_loss -> (B,) fp32, 0 for a row without labels.
    """
    assert getattr(batch, "segments", None) is None, "packed: these rows are one"
    targets, where = supervision(model, batch)
    losses = to_losses(model(batch[0][:, :-1], **where), targets)  # (N,)
    rows = where["logits_at"].nonzero()[:, 0]  # (N,): the row each label is in
    return -losses.new_zeros(len(batch[0])).index_add(0, rows, losses)


def supervision(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict]:
    """The N labelled tokens (N,), and what the model is told beside the tokens: which positions
    predict them, (B, T-1) bool, and what `question` adds."""
    following = batch[1][:, 1:]  # (B, T-1): position t predicts token t + 1
    at = following != IGNORED
    targets = following[at]  # (N,)
    return targets, question(model, at, targets, getattr(batch, "segments", None))


def question(
    model: nn.Module, at: Tensor | tuple[Tensor, Tensor], targets: Tensor,
    segments: list[int] | None,
) -> dict:  # fmt: skip
    """What to call the model with: the positions `at` (a mask, or rows and columns) that predict
    the targets (N,); of a packed batch, where its texts stand; and the targets themselves if the
    model has a `vocabulary_head`, for then it tells their losses itself."""
    asked = {"logits_at": at}
    if segments is not None:
        asked["segments"] = segments
    if hasattr(model, "vocabulary_head"):
        asked["targets"] = targets
    return asked


def to_losses(out: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target, in nats (N,), of a model's answer to `question`: the losses
    themselves, or logits (N, V)."""
    return out if out.dim() == 1 else cross_entropy(out, targets)
