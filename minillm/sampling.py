"""From logits to the next token: one pure function, and the settings it reads.

Sources: top-k: Fan et al. 2018; top-p: Holtzman et al. 2020; min-p: Nguyen et al. 2024;
repetition penalty: Keskar et al. 2019.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.errors import NumericError, UserError, whole_number

FILTERS = ("top_k", "top_p", "min_p")  # settings that may be None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy; None filters nothing.

    Errors: UserError naming the setting, its value and its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    min_p: float | None = None

    def __post_init__(self):
        bad = None
        for name, value in vars(self).items():
            if not hasattr(value, "__float__") and not (value is None and name in FILTERS):
                raise UserError(f"{name} {value!r}: not a number; change it")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            bad = f"temperature {self.temperature}: must be 0 (greedy) or a positive number"
        elif self.top_k is not None and not (hasattr(self.top_k, "__index__") and self.top_k >= 0):
            bad = f"top_k {self.top_k}: must be a whole number, not negative"
        elif self.top_p is not None and not 0 <= self.top_p <= 1:
            bad = f"top_p {self.top_p}: must lie between 0 and 1"
        elif self.min_p is not None and not 0 <= self.min_p <= 1:
            bad = f"min_p {self.min_p}: must lie between 0 and 1"
        elif not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            bad = f"repetition_penalty {self.repetition_penalty}: must be positive, 1 for none"
        if bad:
            raise UserError(f"{bad}; change it")

    @property
    def is_greedy(self) -> bool:
        """Whether the best is taken: also at temperatures that fp32 could not divide by."""
        return self.temperature < 1e-20


def sample_next_token(
    logits: Tensor, sampling: Sampling, streams: list[torch.Generator] | None = None
) -> Tensor:
    """One token id per row: a draw from the candidates, or the argmax at temperature 0.

    Shapes: logits (B, V) fp32 -> (B,) int64; streams: a random stream per row. Errors: NumericError
    for logits that are no numbers.
    """
    best, ids = logits.max(-1)
    if not bool(best.isfinite().all()):  # a GPU would fail for good in the draw
        raise NumericError("the model's logits are no numbers; use --precision fp32")
    if sampling.is_greedy:
        return ids
    ids, probabilities = candidates(logits, sampling)
    drawn = [
        torch.multinomial(row, 1, generator=stream)
        for row, stream in zip(probabilities, streams or [None] * len(logits), strict=True)
    ]
    return ids.gather(-1, torch.stack(drawn)).squeeze(-1)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Ids (best first where top-k or top-p ask for an order, which takes four times as long) and
    what each weighs in the draw: 0 where top-p or min-p removed it.

    Temperature comes first, then top-k: exactly k are left, at least one (ties broken by order),
    and their probabilities sum to 1 (some of them 0 where the temperature is low). top_p leaves the
    fewest that reach p: of 0.5, 0.3, 0.2 and p = 0.7 the first two; p = 0 leaves one. min_p removes
    what has less than that share of the best one's probability. Shapes: logits (B, V) -> (B, k)
    each; temperature must not be 0.
    """
    n = logits.size(-1)
    k = n if sampling.top_k is None else min(max(sampling.top_k, 1), n)
    cuts = sampling.top_p is not None and sampling.top_p < 1  # in fp32 a sum may reach 1 early
    if k == n and not cuts:
        values, ids = logits, torch.arange(n, device=logits.device).expand_as(logits)
    else:
        values, ids = logits.topk(k)  # (B, k)
    # the best logit becomes 0 before the division: a tiny temperature cannot overflow
    best = values.max(-1, keepdim=True).values  # (B, 1)
    probabilities = torch.softmax((values - best) / sampling.temperature, -1)
    removed = torch.zeros_like(probabilities, dtype=torch.bool)
    if cuts:
        before = probabilities.cumsum(-1) - probabilities  # mass of the better candidates
        removed |= before >= sampling.top_p
        removed[:, 0] = False
    if sampling.min_p is not None:
        removed |= probabilities < sampling.min_p * probabilities.max(-1, keepdim=True).values
    return ids, probabilities.masked_fill(removed, 0.0)


def penalize_repetition(
    logits: Tensor, tokens: Tensor, left_pad: Tensor | None, penalty: float,
    eos_id: int | None = None,
) -> Tensor:  # fmt: skip
    """Divides positive and multiplies negative logits of every token seen, prompt included.

    Shapes: logits (B, V), tokens (B, T); paddings do not count as seen, nor does the end of a text:
    GPT-2's also begins one, and an answer would be punished for ending.
    """
    if penalty == 1.0:
        return logits
    seen = torch.zeros_like(logits, dtype=torch.int32)  # (B, V)
    real = torch.ones_like(tokens, dtype=torch.int32)
    if left_pad is not None:
        columns = torch.arange(tokens.size(1), device=tokens.device)
        real = (columns >= left_pad[:, None]).int()
    seen.scatter_add_(1, tokens, real)
    if eos_id is not None:
        seen[:, eos_id] = 0
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen > 0, penalized, logits)


def random_streams(seed: int | None, n: int, device: torch.device) -> list[torch.Generator]:
    """A generator per row, seeded seed + row; without a seed, from PyTorch's global stream.
    Errors: UserError for a seed that is no whole number of 64 bits."""
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    wanted = "must be a whole number of 64 bits; change it"
    seed = whole_number(seed, "seed", wanted)
    if not -(2**63) <= seed <= 2**64 - n:
        raise UserError(f"seed {seed}: {wanted}")
    return [torch.Generator(device).manual_seed(seed + row) for row in range(n)]
