"""Beam search: the likeliest continuation that a bounded search finds."""

from collections.abc import Sequence

import torch
from torch import nn

from minillm.errors import UserError
from minillm.generate import check_prompts


@torch.no_grad()
def beam_search(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    n_beams: int = 4,
    use_cache: bool = True,
    length_penalty: float = 1.0,
    eos_id: int | None = None,
) -> list[list[int]]:
    """The best continuation of each prompt (new tokens, a closing `eos_id` included), one prompt
    at a time with its beams as the batch.

    A continuation of n tokens scores (sum of its log-probabilities) / n ** length_penalty (Wu et
    al. 2016, without coverage). Finished ones are kept apart and the search ends when no live
    beam can still beat the best of them. n_beams >= V ** (max_new_tokens - 1) tries everything.
    Errors: UserError for an empty or too long prompt or n_beams below 1.
    """
    if n_beams < 1:
        raise UserError(f"n_beams {n_beams}: must be at least 1; change it")
    check_prompts(prompts, model.config.max_seq_len, max_new_tokens, model.config.vocab_size)
    was_training = model.training
    model.eval()
    try:
        return [
            _search(model, list(p), max_new_tokens, n_beams, use_cache, length_penalty, eos_id)
            for p in prompts
        ]
    finally:
        model.train(was_training)


def _search(model, prompt, max_new_tokens, n_beams, use_cache, length_penalty, eos_id):
    max_new_tokens = min(max_new_tokens, model.config.max_seq_len - len(prompt))
    device = next(model.parameters()).device
    tokens = torch.tensor([prompt], device=device)  # (beams, T)
    sums = torch.zeros(1, device=device)  # (beams,) log-probabilities so far
    cache = model.new_cache(1, len(prompt) + max_new_tokens) if use_cache else None
    best, best_score = [], float("-inf")
    for n in range(1, max_new_tokens + 1):
        new = tokens if cache is None else tokens[:, cache.length - cache.n_prefix :]
        last = torch.zeros_like(new, dtype=torch.bool)
        last[:, -1] = True
        scores = sums[:, None] + model(new, cache, logits_at=last).float().log_softmax(-1)
        if eos_id is not None:
            score, row = (scores[:, eos_id] / n**length_penalty).max(0)
            if score > best_score:
                best, best_score = [*tokens[row, len(prompt) :].tolist(), eos_id], float(score)
            scores[:, eos_id] = float("-inf")
        sums, place = scores.flatten().topk(min(n_beams, scores.numel()))
        rows, ids = place // scores.size(1), place % scores.size(1)  # (beams,) each
        tokens = torch.cat((tokens[rows], ids[:, None]), 1)  # (beams, T + 1)
        if cache is not None:
            cache.reorder(rows)
        if best and float(sums[0]) / max_new_tokens**length_penalty <= best_score:
            return best  # log-probabilities only fall: no live beam can catch up
    if max_new_tokens and float(sums[0]) / max_new_tokens**length_penalty > best_score:
        return tokens[0, len(prompt) :].tolist()
    return best
