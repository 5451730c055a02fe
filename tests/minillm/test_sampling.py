"""How the next token is chosen: each filter does what it says, alone and after the others."""

import math

import pytest
import torch

from minillm.errors import NumericError, UserError
from minillm.sampling import Sampling, candidates, penalize_repetition, sample_next_token


def draws(logits: list[float], n: int = 400, **settings) -> set[int]:
    rows = torch.tensor([logits]).expand(n, -1)
    streams = [torch.Generator().manual_seed(i) for i in range(n)]
    return set(sample_next_token(rows, Sampling(**settings), streams).tolist())


def test_temperature_zero_takes_the_best():
    assert draws([1.0, 3.0, 2.0]) == {1}


def test_top_k_keeps_exactly_k_of_equal_candidates():
    assert len(draws([0.0] * 8, temperature=1.0, top_k=3)) == 3


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1), (0.49, 1), (0.51, 2), (0.81, 3), (1.0, 3)])
def test_top_p_keeps_the_fewest_that_reach_it(p, kept):
    logits = [math.log(x) for x in (0.3, 0.5, 0.2)]
    assert draws(logits, temperature=1.0, top_p=p) == {1, 0, 2} - {0, 2}.difference(
        {0} if kept > 1 else set(), {2} if kept > 2 else set()
    )


def test_a_top_k_of_0_keeps_the_best():
    assert draws([0.0, 1.0, 0.5], temperature=1.0, top_k=0) == {1}


def test_a_top_k_above_the_vocabulary_filters_nothing():
    assert draws([0.0, 0.0], temperature=1.0, top_k=99) == {0, 1}


def test_a_tiny_temperature_does_not_overflow():
    for temperature in (1e-19, 1e-300):
        assert draws([1.0, 80.0, 2.0], temperature=temperature) == {1}


def test_the_repetition_penalty_counts_each_token_once_and_no_padding():
    logits = torch.tensor([[2.0, -2.0, 4.0, 1.0]])
    tokens, pads = torch.tensor([[0, 0, 1, 2, 2]]), torch.tensor([2])
    got = penalize_repetition(logits, tokens, pads, 2.0)
    assert got.tolist() == [[2.0, -4.0, 2.0, 1.0]]


def test_ending_is_no_repetition():
    """GPT-2's end-of-text also begins every prompt."""
    logits = torch.tensor([[2.0, -2.0, 4.0]])
    got = penalize_repetition(logits, torch.tensor([[1, 0]]), None, 2.0, eos_id=1)
    assert got.tolist() == [[1.0, -2.0, 4.0]]


@pytest.mark.parametrize(("p", "kept"), [(0.0, 4), (0.19, 3), (0.3, 2), (0.61, 1), (1.0, 1)])
def test_min_p_drops_what_is_too_far_below_the_best(p, kept):
    logits = [math.log(x) for x in (0.09, 0.3, 0.5, 0.11)]
    assert draws(logits, temperature=1.0, min_p=p) == set([2, 1, 3, 0][:kept])


def test_min_p_grows_with_the_temperature():
    logits = torch.tensor([[0.0, -2.0, -4.0]])
    found = [candidates(logits, Sampling(t, min_p=0.1))[1].count_nonzero().item()
             for t in (0.5, 1.0, 2.0)]  # fmt: skip
    assert found == [1, 2, 3]


@pytest.mark.parametrize("settings", [
    {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
])  # fmt: skip
def test_the_candidates_are_those_of_transformers(settings):
    peers = pytest.importorskip("transformers.generation.logits_process")
    logits, temperature = torch.randn(6, 300) * 3, 1.3
    kinds = {"top_k": peers.TopKLogitsWarper, "top_p": peers.TopPLogitsWarper,
             "min_p": peers.MinPLogitsWarper}  # fmt: skip
    theirs = peers.TemperatureLogitsWarper(temperature)(None, logits)
    for name, value in settings.items():
        theirs = kinds[name](value)(None, theirs)
    ids, weights = candidates(logits, Sampling(temperature, **settings))
    ours = torch.zeros_like(logits).scatter(1, ids, weights / weights.sum(1, keepdim=True))
    assert torch.allclose(ours, theirs.softmax(-1), atol=1e-6)


def test_the_penalty_is_that_of_transformers():
    peers = pytest.importorskip("transformers.generation.logits_process")
    logits, tokens = torch.randn(3, 50), torch.randint(0, 50, (3, 20))
    theirs = peers.RepetitionPenaltyLogitsProcessor(1.4)(tokens, logits)
    assert torch.equal(penalize_repetition(logits, tokens, None, 1.4), theirs)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_min_p_outside_its_range_is_refused(value):
    with pytest.raises(UserError, match="min_p"):
        Sampling(1.0, min_p=value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error_also_of_greedy_decoding(temperature):
    with pytest.raises(NumericError, match="no numbers"):
        draws([0.0, math.nan, 1.0], 1, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_row_that_is_no_number_is_an_error(temperature):
    logits = torch.tensor([[0.0, 1.0], [0.0, math.nan]])
    with pytest.raises(NumericError, match="no numbers"):
        sample_next_token(logits, Sampling(temperature))


def test_top_p_stops_where_the_sum_is_p():
    assert candidates(torch.zeros(1, 2), Sampling(1.0, top_p=0.5))[1].tolist() == [[0.5, 0.0]]
