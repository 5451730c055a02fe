"""Generation with and without the KV cache: one loop, one pure sampling function.

Sources: top-k: Fan et al. 2018; top-p: Holtzman et al. 2020;
repetition penalty: Keskar et al. 2019.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minillm.errors import NumericError, UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy; top_k and top_p None filter nothing.

    Errors: UserError naming the setting, its value and its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        bad = None
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            bad = f"temperature {self.temperature}: must be 0 (greedy) or a positive number"
        elif self.top_k is not None and self.top_k < 0:
            bad = f"top_k {self.top_k}: must be at least 1"
        elif self.top_p is not None and not 0 <= self.top_p <= 1:
            bad = f"top_p {self.top_p}: must lie between 0 and 1"
        elif not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            bad = f"repetition_penalty {self.repetition_penalty}: must be positive, 1 for none"
        if bad:
            raise UserError(f"{bad}; change it")


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    use_cache: bool = True,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_id: int | None = None,
    seed: int | None = None,
    prompt: Tensor | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, the closing `eos_id` included where a row came to its end.

    Rows may differ in length: a ragged batch gives what each prompt gives alone. Row i draws from
    its own stream, seed + i, so a sample does not depend on its neighbours. Generation stops at
    `max_new_tokens`, or for all rows where the longest fills the model's context.
    Merges LoRA for the time it runs and puts the model back into the mode it was in.

    Shapes: prompt (P, D), a soft prompt before every row. Units: max_new_tokens in tokens.
    Errors: UserError for an empty prompt, one that leaves no room in the context, or a sampling
    setting outside its range.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    rows: list[list[int]] = [[] for _ in prompts]
    steps = generate_steps(
        model, prompts, max_new_tokens, sampling, use_cache, eos_id, seed, prompt
    )
    for new_tokens in steps:
        for row, token in zip(rows, new_tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def generate_steps(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    use_cache: bool = True,
    eos_id: int | None = None,
    seed: int | None = None,
    prompt: Tensor | None = None,
) -> Iterator[list[int | None]]:
    """`generate` one step at a time, for streaming: each step yields a token per row, or None
    for a row that has ended. Arguments and errors are those of `generate`."""
    n_prompt = 0 if prompt is None else prompt.size(0)
    limit = model.config.max_seq_len - n_prompt
    check_prompts(prompts, limit, max_new_tokens, model.config.vocab_size)
    if not prompts or max_new_tokens == 0:
        return
    device = next(model.parameters()).device
    tokens, left_pad = pad_left(prompts, device)  # (B, T), (B,) or None
    max_new_tokens = min(max_new_tokens, limit - tokens.size(1))
    streams = None if sampling.temperature == 0 else random_streams(seed, len(prompts), device)
    cache = None
    if use_cache:
        cache = model.new_cache(len(prompts), n_prompt + tokens.size(1) + max_new_tokens)
    ended = [False] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            # with a cache only the columns it does not hold yet; without, all from the start
            start = 0 if cache is None else cache.length - cache.n_prefix
            new = tokens[:, start:]
            last = torch.zeros_like(new, dtype=torch.bool)
            last[:, -1] = True
            with torch.no_grad():
                soft = prompt if start == 0 else None
                logits = model(new, cache, left_pad, soft, last).float()  # (B, V)
                logits = penalize_repetition(
                    logits, tokens, left_pad, sampling.repetition_penalty
                )
                chosen = sample_next_token(logits, sampling, streams)  # (B,)
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)  # (B, T + 1)
            ids = chosen.tolist()
            yield [None if end else token for end, token in zip(ended, ids, strict=True)]
            ended = [end or token == eos_id for end, token in zip(ended, ids, strict=True)]
            if all(ended):
                return
    finally:
        model.train(was_training)


def sample_next_token(
    logits: Tensor, sampling: Sampling, streams: list[torch.Generator] | None = None
) -> Tensor:
    """One token id per row. Temperature 0 is the argmax; then top-k, then top-p, then a draw.

    top_k keeps exactly k candidates, at least one (ties broken by order). top_p keeps the fewest
    candidates whose probabilities reach p: with 0.5, 0.3, 0.2 and p = 0.7 it keeps the first two;
    p = 0 keeps one. Shapes: logits (B, V) fp32 -> (B,) int64; streams: a random stream per row.
    Errors: NumericError for logits that are no numbers.
    """
    if sampling.temperature < 1e-20:  # fp32 could not divide by it
        return logits.argmax(-1)
    n = logits.size(-1)
    k = n if sampling.top_k is None else min(max(sampling.top_k, 1), n)
    values, ids = logits.topk(k)  # (B, k), best first
    # the best logit becomes 0 before the division: a tiny temperature cannot overflow
    probabilities = torch.softmax((values - values[:, :1]) / sampling.temperature, -1)
    if sampling.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # mass of the better candidates
        reached = before >= sampling.top_p
        reached[:, 0] = False
        probabilities = probabilities.masked_fill(reached, 0.0)
    streams = streams or [None] * len(logits)
    try:
        drawn = [
            torch.multinomial(row, 1, generator=stream)
            for row, stream in zip(probabilities, streams, strict=True)
        ]
    except RuntimeError as error:
        raise NumericError(f"the model's logits are no numbers ({error})") from None
    return ids.gather(-1, torch.stack(drawn)).squeeze(-1)


def penalize_repetition(
    logits: Tensor, tokens: Tensor, left_pad: Tensor | None, penalty: float
) -> Tensor:
    """Divides positive and multiplies negative logits of every token seen, prompt included.

    Shapes: logits (B, V), tokens (B, T); paddings do not count as seen.
    """
    if penalty == 1.0:
        return logits
    seen = torch.zeros_like(logits, dtype=torch.int32)  # (B, V)
    real = torch.ones_like(tokens, dtype=torch.int32)
    if left_pad is not None:
        columns = torch.arange(tokens.size(1), device=tokens.device)
        real = (columns >= left_pad[:, None]).int()
    seen.scatter_add_(1, tokens, real)
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen > 0, penalized, logits)


def pad_left(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Prompts as one block (B, T), with the count of paddings per row (B,), None if there are none.

    The padding id is 0, any valid id: the mask hides it by position, not by value.
    """
    longest = max(len(p) for p in prompts)
    pads = [longest - len(p) for p in prompts]
    rows = [[0] * pad + list(p) for pad, p in zip(pads, prompts, strict=True)]
    tokens = torch.tensor(rows, dtype=torch.int64, device=device)
    return tokens, torch.tensor(pads, device=device) if any(pads) else None


def random_streams(seed: int | None, n: int, device: torch.device) -> list[torch.Generator]:
    """A generator per row, seeded seed + row; without a seed, from PyTorch's global stream."""
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    return [torch.Generator(device).manual_seed(seed + row) for row in range(n)]


def check_prompts(
    prompts: Sequence[Sequence[int]], limit: int, max_new_tokens: int, vocab_size: int
) -> None:
    """Errors: UserError if a prompt is empty, leaves no room for one new token, or holds an id
    that the embedding does not (a GPU would answer that by failing for good)."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens {max_new_tokens}: must not be negative; change it")
    for number, tokens in enumerate(prompts, 1):
        if len(tokens) == 0:
            raise UserError(f"prompt {number}: no tokens; begin it with the tokenizer's bos_id")
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            raise UserError(
                f"prompt {number}: ids {min(tokens)} to {max(tokens)}, but the model knows 0 to "
                f"{vocab_size - 1}; use the tokenizer it was trained with"
            )
        if len(tokens) >= limit:
            raise UserError(
                f"prompt {number}: {len(tokens)} tokens leave no room in the context of {limit}; "
                "shorten it"
            )
