"""Packed samples: side by side in one forward they are what they are apart."""

import pytest
import torch

from llama import Llama
from minillm.data.batches import Batches, Row, pack
from minillm.errors import UserError
from minillm.footprint import measure_footprint, predict_footprint
from minillm.losses import sequence_logprobs, token_loss
from minillm.precision import Precision
from tests.conftest import MODELS, ragged_rows, small_config

LENGTHS = (5, 17, 33, 2, 9, 20, 16, 3, 60)
KINDS = ("llama-gqa", "gpt2", "phi")


def ragged(lengths=LENGTHS) -> list[Row]:
    rows = []
    for n in lengths:
        tokens = torch.randint(2048, (n,))
        labels = tokens.clone()
        labels[: n // 3] = -100
        rows.append(Row(tokens, labels))
    return rows


def loss_and_gradients(model, rows, packed):
    model.zero_grad()
    total, count = 0.0, 0
    for batch in Batches(rows, 1, 0, 0, 128, packed).group(0, len(rows)):
        loss, n = token_loss(model, batch)
        loss.backward()
        total, count = total + loss.detach(), count + int(n)
    return total, count, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize("packed", [10, 64, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_samples_apart(kind, packed, attention, checkpointing):
    model, rows = MODELS[kind]().double(), ragged()
    want, n_want, apart = loss_and_gradients(model, rows, None)
    model.attention, model.gradient_checkpointing = attention, checkpointing
    got, n_got, together = loss_and_gradients(model, rows, packed)
    assert n_got == n_want
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-10)


def test_one_token_alone_is_packed_to_no_loss():
    loss, count = token_loss(MODELS["gpt2"](), pack(ragged([1]), 0))
    assert float(loss.detach()) == int(count) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_sees_nothing_of_its_neighbour(kind):
    model = MODELS[kind]().double()
    tokens = torch.randint(2048, (1, 24))
    other = tokens.clone()
    other[0, :10] = torch.randint(2048, (10,))
    with torch.no_grad():
        a, b = (model(t, segments=[10, 14])[0, 10:] for t in (tokens, other))
        assert torch.equal(a, b)
        leaking = model(other)[0, 10:]  # what plain causal attention would give
    assert (leaking - a).abs().max() > 1e-3


def test_nothing_is_predicted_across_a_border_and_rows_stay_as_they_are():
    rows = [Row(torch.tensor(t), torch.tensor(t)) for t in ([1, 2, 3], [4, 5], [6])]
    batch = pack(rows, pad_id=9)
    assert batch.tokens[0].tolist() == [1, 2, 3, 4, 5, 6] + 11 * [9]
    assert batch.labels[0].tolist() == [-100, 2, 3, -100, 5, -100] + 11 * [-100]
    assert batch.segments == [3, 2, 1, 10] and batch.lengths.tolist() == [3, 2, 1]
    assert [row.labels.tolist() for row in rows] == [[1, 2, 3], [4, 5], [6]]


@pytest.mark.parametrize("length", [1, 2, 16, 17, 18, 33])
def test_segments_fill_exactly_what_the_model_is_fed(length):
    for rows in (ragged([length]), ragged([5, length])):
        batch = pack(rows, 0)
        fed = batch.tokens.size(1) - 1
        assert sum(batch.segments) == fed and fed % 16 == 0 and min(batch.segments, default=1) > 0


def test_every_step_holds_the_same_samples_however_they_are_cut():
    rows = ragged()
    plain, packed = (Batches(rows, 2, 0, 3, 128, size) for size in (None, 40))
    for step in range(2 * plain.groups_per_epoch(2)):
        want = [t for batch in plain.group(step, 2) for t in batch.lengths.tolist()]
        forwards = packed.group(step, 2)
        assert [t for batch in forwards for t in batch.lengths.tolist()] == want
        assert all(batch.lengths.sum() <= 40 or len(batch.lengths) == 1 for batch in forwards)


def test_the_largest_forward_is_that_of_the_steps_as_they_are_packed():
    batches = Batches(ragged(), 1, 0, 3, 128, 40)
    steps = [batch for step in range(3) for batch in batches.group(step, 4)]
    assert batches.largest(4).lengths.sum() == max(batch.lengths.sum() for batch in steps)


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_segment_is_held_against_the_context(kind):
    model = MODELS[kind]()
    assert model(torch.zeros(1, 200, dtype=torch.int64), segments=[100, 100]).shape[1] == 200
    with pytest.raises(UserError, match="129 tokens do not fit"):
        model(torch.zeros(1, 200, dtype=torch.int64), segments=[129, 71])


@pytest.mark.parametrize("kind", KINDS)
def test_segments_go_with_no_prompt_and_no_cache(kind):
    model, tokens = MODELS[kind](), torch.zeros(1, 8, dtype=torch.int64)
    for other in ({"prompt": torch.zeros(2, 32)}, {"cache": model.new_cache(1, 8)}):
        with pytest.raises(UserError, match="leave out --pack"):
            model(tokens, segments=[4, 4], **other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_a_packed_forward_is_predicted(kind):
    model, how = MODELS[kind](), Precision("fp32", torch.device("cpu"))
    batch = Batches(ragged(), 1, 0, 0, 128, 100).largest(len(LENGTHS))
    found, predicted = (f(model, batch, how, 8).rows() for f in (measure_footprint,
                                                                predict_footprint))  # fmt: skip
    assert predicted == pytest.approx(found, rel=0.02, abs=2048)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_step_is_taken_to_have_several_forwards(kind):
    """As many as its texts fill, whatever --accumulation-steps says: gradients are in place."""
    model, how = MODELS[kind](), Precision("fp32", torch.device("cpu"))
    batch = Batches(ragged(), 8, 0, 0, 128, 100).largest(1)
    one, many = (predict_footprint(model, batch, how, steps) for steps in (1, 8))
    assert one.total == many.total


def test_packed_rows_are_not_summed_as_if_they_were_one():
    with pytest.raises(AssertionError, match="packed"):
        sequence_logprobs(Llama(small_config()), pack(ragged_rows(3), 0))
