"""Generation with and without the KV cache: one loop. How a token is chosen is in sampling.py."""

import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minillm.adapt.lora import evaluating
from minillm.cache import KVCache
from minillm.errors import UserError, whole_number
from minillm.linear import pack_weights, unpack_weights
from minillm.sampling import Sampling, penalize_repetition, random_streams, sample_next_token
from minillm.text_stream import StopStrings

LONG = 64  # from so many new tokens on, packed copies of the weights pay (pack_weights)


class Step(NamedTuple):
    """One step of a generation: a token per row, None for a row that has ended, and the logits
    (B, V), fp32, that it was chosen from (before any penalty)."""

    tokens: list[int | None]
    logits: Tensor


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
    min_p: float | None = None,
    stop: StopStrings | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, including `eos_id` where a row ended with it; or up to the
    token that completes a stop string (`stop.cut` takes it off the text).

    Rows may differ in length: a ragged batch gives what each prompt gives alone. Row i draws from
    its own stream, seed + i, so a sample does not depend on its neighbours. Generation stops at
    `max_new_tokens`, or for all rows where the longest fills the model's context.
    Merges LoRA while it runs, unless 16-bit rounding would lose the update (`eval_exactly`), and
    restores every module's mode.

    Shapes: prompt (P, D), a soft prompt before every row. Units: max_new_tokens in tokens.
    Errors: UserError for an empty prompt, one that leaves no room in the context, or a sampling
    setting outside its range.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, min_p)
    rows: list[list[int]] = [[] for _ in prompts]
    steps = generate_steps(
        model, prompts, max_new_tokens, sampling, use_cache, eos_id, seed, prompt, stop
    )
    for step in steps:
        for row, token in zip(rows, step.tokens, strict=True):
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
    stop: StopStrings | None = None,
) -> Iterator[Step]:
    """`generate` one step at a time, for streaming, with its arguments and errors. Do not run two
    at once on a model in training mode: the first to end restores that mode for both."""
    eos_id = end_token(eos_id, model.config.vocab_size)
    n_prompt = 0 if prompt is None else soft_length(prompt, model.config)
    limit = model.config.max_seq_len - n_prompt
    check_prompts(prompts, limit, max_new_tokens, model.config.vocab_size)
    if len(prompts) == 0 or max_new_tokens == 0:
        return
    device = next(model.parameters()).device
    tokens, left_pad = pad_left(prompts, device)  # (B, T), (B,) or None
    max_new_tokens = min(max_new_tokens, limit - tokens.size(1))
    streams = None if sampling.is_greedy else random_streams(seed, len(prompts), device)
    cache = None
    if use_cache:
        cache = model.new_cache(len(prompts), n_prompt + tokens.size(1) + max_new_tokens)
    rows: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    with evaluating(model):
        try:
            for n in range(max_new_tokens):
                if n == 1 and cache is not None and max_new_tokens >= LONG:
                    pack_weights(model)  # after the prefill, whose many rows need no copies
                with torch.inference_mode():  # no_grad would cost 2 to 3 % more a token
                    logits = next_logits(model, tokens, cache, left_pad, prompt)  # (B, V)
                    penalty = sampling.repetition_penalty
                    penalized = penalize_repetition(logits, tokens, left_pad, penalty, eos_id)
                    chosen = sample_next_token(penalized, sampling, streams)  # (B,)
                tokens = torch.cat((tokens, chosen[:, None]), dim=1)  # (B, T + 1)
                ids = chosen.tolist()
                shown = [None if end else token for end, token in zip(ended, ids, strict=True)]
                yield Step(shown, logits.clone())  # an ordinary tensor again
                for i, token in enumerate(shown):
                    if token is None:
                        continue
                    rows[i].append(token)
                    at_stop = stop is not None and stop.ends(prompts[i], rows[i])
                    ended[i] = at_stop or token == eos_id
                if all(ended):
                    return
        finally:
            unpack_weights(model)


def next_logits(
    model: nn.Module, tokens: Tensor, cache: KVCache | None, left_pad: Tensor | None,
    prompt: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Logits of the token after the last column, (B, V) fp32. With a cache only the columns that it
    does not hold yet are computed; without, all (B, T) from the start."""
    start = 0 if cache is None else cache.length - cache.n_prefix
    new = tokens[:, start:]
    last = torch.zeros_like(new, dtype=torch.bool)
    last[:, -1] = True
    return model(new, cache, left_pad, prompt if start == 0 else None, last).float()


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


def end_token(eos_id: int | None, vocab_size: int) -> int | None:
    """The id that ends a row, None for none the model has. Errors: UserError for several."""
    if eos_id is not None:
        wanted = "not one whole number; give the id that ends a text"
        eos_id = whole_number(eos_id, "eos_id", wanted)
    return eos_id if eos_id in range(vocab_size) else None


def soft_length(prompt: Tensor, config) -> int:
    """Positions of a soft prompt (P, D). Errors: UserError if it is not of the model's width, or
    fills its context."""
    wanted = f"this model takes a soft prompt (P, {config.dim})"
    if not isinstance(prompt, Tensor):
        raise UserError(f"prompt of type {type(prompt).__name__}: {wanted}; give a tensor")
    if prompt.dim() != 2 or prompt.size(1) != config.dim:
        raise UserError(f"prompt {tuple(prompt.shape)}: {wanted}; give one that was trained on it")
    if len(prompt) >= config.max_seq_len - 1:
        raise UserError(f"prompt {tuple(prompt.shape)}: leaves no room for a text in the context "
                        f"of {config.max_seq_len}; give a shorter one")  # fmt: skip
    return len(prompt)


def check_prompts(
    prompts: Sequence[Sequence[int]], limit: int, max_new_tokens: int, vocab_size: int
) -> None:
    """Errors: UserError if a prompt is no list of ids, empty, leaves no room for one new token, or
    holds an id that the embedding does not (a GPU would answer that by failing for good)."""
    if not hasattr(max_new_tokens, "__index__") or max_new_tokens < 0:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be a whole number, not negative; "
                        "change it")  # fmt: skip
    for number, tokens in enumerate(prompts, 1):
        is_number = not hasattr(tokens, "__len__") or getattr(tokens, "ndim", 1) == 0
        if is_number or isinstance(tokens, str):
            raise UserError(f"prompt {number}: {tokens!r}; give a list of prompts, each a list of "
                            "ids, as tokenizer.encode returns one")  # fmt: skip
        if len(tokens) == 0:
            raise UserError(f"prompt {number}: no tokens; begin it with the tokenizer's bos_id")
        try:
            ids = [operator.index(token) for token in tokens]
        except TypeError:
            raise UserError(f"prompt {number}: holds more than whole numbers; give ids, as of "
                            "tokenizer.encode") from None  # fmt: skip
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise UserError(
                f"prompt {number}: ids {min(ids)} to {max(ids)}, but the model knows 0 to "
                f"{vocab_size - 1}; use the tokenizer it was trained with"
            )
        if len(tokens) >= limit:
            raise UserError(
                f"prompt {number}: {len(tokens)} tokens leave no room in the context of {limit}; "
                "shorten it"
            )
