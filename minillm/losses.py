"""Objectives: each maps (model, batch) to a summed loss and the number of its terms.

Sums, not means: the loop divides by the count of the whole optimizer step, so that a row with
10 targets beside one with 190 weighs 5 %, however the step is cut into micro-batches.
"""

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # label of a position without supervision, PyTorch's own default


def token_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every labelled token given all tokens before it, summed, in nats.

    Shapes: batch = (tokens (B, T), labels (B, T), ...) with labels[t] the token at t or -100; the
    one shift happens here. Returns (loss sum, number of labelled tokens), both scalars. Only the N
    positions that predict a labelled token meet the vocabulary matrix.
    """
    tokens, labels = batch[:2]
    targets = labels[:, 1:]  # (B, T-1): position t predicts token t + 1
    supervised = targets != IGNORED
    logits = model(tokens[:, :-1], logits_at=supervised)  # (N, V)
    loss = F.cross_entropy(logits.float(), targets[supervised], reduction="sum")
    return loss, supervised.sum()


def sequence_logprobs(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Log-probability of each row's labelled tokens given all before them, summed, in nats.

    Shapes: batch as for token_loss -> (B,) fp32, 0 for a row without labels.
    """
    tokens, labels = batch[:2]
    targets = labels[:, 1:]  # (B, T-1)
    supervised = targets != IGNORED
    logits = model(tokens[:, :-1], logits_at=supervised)  # (N, V)
    losses = F.cross_entropy(logits.float(), targets[supervised], reduction="none")  # (N,)
    rows = supervised.nonzero()[:, 0]  # (N,): the row each label is in
    return -losses.new_zeros(len(tokens)).index_add(0, rows, losses)
