"""Beam search against brute force over a vocabulary small enough to try everything."""

import itertools

import pytest
import torch
from torch import nn

from minillm import beam_search, generate
from minillm.adapt.prompts import PrefixTuning, SoftPrompt, prefix_of_text
from minillm.errors import NumericError, UserError
from tests.conftest import MODELS, small_config

VOCAB = 4


@pytest.fixture(params=["llama-gqa 0", "llama-gqa 1", "gpt2 2", "gpt2 3", "phi 4"])
def model(request) -> nn.Module:
    kind, seed = request.param.split()
    torch.manual_seed(int(seed))
    return MODELS[kind](vocab_size=VOCAB)


@torch.no_grad()
def brute_force(model, prompt, n_new, penalty, eos):
    """The best-scoring of all continuations that end with EOS or run to the limit."""
    tails = list(itertools.product(range(VOCAB), repeat=n_new))
    logs = model(torch.tensor([[*prompt, *tail] for tail in tails])).log_softmax(-1)  # (N, T, V)
    best, best_score = None, float("-inf")
    for tail, log in zip(tails, logs[:, len(prompt) - 1 : -1], strict=True):
        if eos in tail:
            tail = tail[: tail.index(eos) + 1]
        at = torch.tensor(tail)[:, None]
        score = log[: len(tail)].gather(-1, at).sum().item() / len(tail) ** penalty
        if score > best_score + 1e-6:
            best, best_score = list(tail), score
    return best


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_wide_beam_finds_what_brute_force_finds(model, penalty, use_cache):
    want = brute_force(model, [1, 2], 4, penalty, eos=3)
    assert beam_search(model, [[1, 2]], 4, VOCAB**3, use_cache, penalty, eos_id=3) == [want]


def test_one_beam_without_eos_is_greedy(model):
    prompts = [[1, 2], [3]]
    assert beam_search(model, prompts, 9, n_beams=1) == generate(model, prompts, 9)


@pytest.mark.parametrize("n_beams", [2, 3])
def test_ragged_prompts_get_what_each_gets_alone_with_and_without_the_cache(model, n_beams):
    prompts = [[1, 2, 0, 1], [2], [0, 1]]
    together = beam_search(model, prompts, 7, n_beams, eos_id=3)
    assert together == [beam_search(model, [p], 7, n_beams, eos_id=3)[0] for p in prompts]
    assert together == beam_search(model, prompts, 7, n_beams, use_cache=False, eos_id=3)


@pytest.mark.parametrize("wrap", [
    lambda model: SoftPrompt(model, torch.randn(3, 32)),
    lambda model: PrefixTuning(model, prefix_of_text(model, [1, 2, 0])),
], ids=["soft prompt", "prefix"])  # fmt: skip
def test_beams_go_after_a_soft_prompt_or_prefix(model, wrap):
    tuned, prompts = wrap(model).eval(), [[1, 2, 0, 1], [2], [0, 1]]
    with_cache = beam_search(tuned, prompts, 6, 3, eos_id=3)
    assert with_cache == beam_search(tuned, prompts, 6, 3, use_cache=False, eos_id=3)
    assert beam_search(tuned, prompts, 6, 1) == generate(tuned, prompts, 6)


@torch.no_grad()
def test_a_wider_beam_finds_nothing_worse(model):
    def score(tail: list[int]) -> float:
        logs = model(torch.tensor([[1, 2, *tail]])).log_softmax(-1)[0, 1:-1]
        return float(logs.gather(-1, torch.tensor(tail)[:, None]).mean())

    found = [beam_search(model, [[1, 2]], 4, n, eos_id=3)[0] for n in (1, VOCAB**3)]
    assert score(found[0]) <= score(found[1]) + 1e-6


def test_it_stops_at_the_context_and_refuses_no_beams(model):
    assert len(beam_search(model, [[1] * 125], 50)[0]) == 3
    for n_beams in (0, 2.5, "2"):
        with pytest.raises(UserError, match=f"n_beams {n_beams!r}"):
            beam_search(model, [[1]], 3, n_beams=n_beams)


def test_prompts_may_be_one_tensor(model):
    prompts = torch.tensor([[1, 2], [3, 0]])
    assert beam_search(model, prompts, 3) == beam_search(model, prompts.tolist(), 3)


def test_a_negative_length_penalty_is_refused(model):
    with pytest.raises(UserError, match="length_penalty"):
        beam_search(model, [[1]], 3, length_penalty=-1.0)


def test_logits_that_are_no_numbers_are_an_error(model):
    with torch.no_grad():
        model.vocabulary_head.weight.fill_(float("nan"))
    with pytest.raises(NumericError, match="no numbers"):
        beam_search(model, [[1, 2]], 4)


class Markov(nn.Module):
    """A model whose next token depends on the last one alone, by the rows of a table."""

    def __init__(self, *rows: list[float]):
        super().__init__()
        self.config = small_config(vocab_size=len(rows))
        self.logs = nn.Parameter(torch.tensor(rows).log())

    def forward(self, tokens, cache, left_pad, prompt, logits_at):
        return self.logs[tokens[logits_at]]


STAY, EITHER = [0.01, 0.98, 0.01], [0.3, 0.3, 0.4]  # token 2 ends a text


@pytest.mark.parametrize(("first", "second", "prompts", "best"), [
    ([0.2, 0.3, 0.5], STAY, [[0]], [[1, 1, 1]]),  # an early end, which a longer mean passes
    ([0.005, 0.005, 0.99], STAY, [[0], [1]], [[2], [1, 1, 1]]),  # ends beside one that goes on
    ([0.05, 0.9, 0.05], [0.2, 0.2, 0.6], [[0]], [[1, 2]]),  # an end, scored by its own length
])  # fmt: skip
def test_ends_are_weighed_by_the_mean_of_their_own_length(first, second, prompts, best):
    model = Markov(first, second, EITHER)
    assert beam_search(model, prompts, 3, 2, use_cache=False, eos_id=2) == best


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_know_no_dropout(use_cache):
    model = MODELS["gpt2"](vocab_size=64).eval()
    want = beam_search(model, [[1, 2]], 8, 3, use_cache)
    model.train().dropout = 0.5
    assert beam_search(model, [[1, 2]], 8, 3, use_cache) == want
