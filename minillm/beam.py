"""Beam search: the likeliest continuation that a bounded search finds.

Sources: Graves 2012 (the search); Wu et al. 2016, section 7 (the length penalty).
"""

from collections.abc import Sequence

import torch
from torch import nn

from minillm.adapt.lora import evaluating
from minillm.errors import NumericError, UserError, whole_number
from minillm.generate import check_prompts, end_token, next_logits, pad_left


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
    """The best continuation of each prompt (new tokens, a closing `eos_id` included). All beams of
    all prompts, which may differ in length, are one batch.

    A continuation of n tokens scores (sum of its log-probabilities) / n ** length_penalty (Wu et
    al. 2016, without coverage). Finished ones are kept apart, and the search for a prompt ends when
    none of its live beams can still beat the best of them. n_beams >= V ** (max_new_tokens - 1)
    tries everything. As in `generate`, it ends for all where the longest fills the context.
    Errors: UserError for an empty or too long prompt, n_beams below 1, a negative length_penalty.
    """
    wanted = "must be a whole number of at least 1; change it"
    n_beams = whole_number(n_beams, "n_beams", wanted)
    if n_beams < 1:
        raise UserError(f"n_beams {n_beams}: {wanted}")
    is_number = hasattr(length_penalty, "__float__")
    if not is_number or not length_penalty >= 0:  # an end that could still win is not waited for
        raise UserError(f"length_penalty {length_penalty!r}: must be a number from 0 on; change it")
    eos_id = end_token(eos_id, model.config.vocab_size)
    limit = model.config.max_seq_len
    check_prompts(prompts, limit, max_new_tokens, model.config.vocab_size)
    if len(prompts) == 0 or max_new_tokens == 0:
        return [[] for _ in prompts]
    with evaluating(model):
        return _search(model, prompts, max_new_tokens, n_beams, use_cache, length_penalty, eos_id)


def _search(model, prompts, max_new_tokens, n_beams, use_cache, length_penalty, eos_id):
    """K beams of each of B prompts; K grows from 1 to n_beams in the first steps."""
    tokens, left_pad = pad_left(prompts, next(model.parameters()).device)  # (B K, T), (B K,)
    start, n_rows = tokens.size(1), len(prompts)
    max_new_tokens = min(max_new_tokens, model.config.max_seq_len - start)
    cache = model.new_cache(n_rows, start + max_new_tokens) if use_cache else None
    sums = torch.zeros(n_rows, 1, device=tokens.device)  # (B, K) log-probabilities so far
    best: list[list[int]] = [[] for _ in prompts]
    best_score = [float("-inf")] * n_rows
    for n in range(1, max_new_tokens + 1):
        logs = next_logits(model, tokens, cache, left_pad).log_softmax(-1)  # (B K, V)
        scores = sums[..., None] + logs.view(*sums.shape, -1)  # (B, K, V)
        n_before, n_words = scores.shape[1:]
        if eos_id is not None:
            ended, beams = (scores[..., eos_id] / n**length_penalty).max(1)  # (B,) each
            for i, (score, beam) in enumerate(zip(ended.tolist(), beams.tolist(), strict=True)):
                if score > best_score[i]:
                    row = tokens[i * n_before + beam, start:]
                    best[i], best_score[i] = [*row.tolist(), eos_id], score
            scores[..., eos_id] = float("-inf")
        sums, place = scores.flatten(1).topk(min(n_beams, n_before * n_words))  # (B, K) each
        if bool(sums.isnan().any()):
            raise NumericError("the model's logits are no numbers; use --precision fp32")
        first = torch.arange(n_rows, device=tokens.device)[:, None] * n_before
        rows = (first + place // n_words).flatten()  # (B K,): where each beam comes from
        tokens = torch.cat((tokens[rows], (place % n_words).view(-1, 1)), 1)  # (B K, T + 1)
        left_pad = left_pad if left_pad is None else left_pad[rows]
        if cache is not None:
            cache.reorder(rows)
        # log-probabilities only fall: what a live beam may still reach is this at most
        reachable = (sums[:, 0] / max_new_tokens**length_penalty).tolist()
        if all(live <= score for live, score in zip(reachable, best_score, strict=True)):
            return best
    alive = tokens.view(n_rows, -1, tokens.size(1))[:, 0, start:].tolist()  # each one's likeliest
    found = zip(reachable, best_score, alive, best, strict=True)
    return [row if live > score else done for live, score, row, done in found]
