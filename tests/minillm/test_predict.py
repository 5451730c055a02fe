"""Labels from a language model: batches change nothing, garbage is counted, both labels scored."""

from dataclasses import replace

import pytest
import torch

from gpt2 import GPT2
from llama import Llama
from minillm.data.samples import Sample
from minillm.losses import sequence_logprobs
from minillm.metrics import NONE
from minillm.predict import label_row, predict_labels, read_label
from tests.conftest import sharp, small_config, small_gpt2

LABELS = ("negative", "positive")
TEXTS = ["dull", "a cat sat on the mat and it was good", "x" * 30, "the hat", "12 o'clock"]


@pytest.fixture(params=["gpt2", "llama"])
def both(request, bpe, tokenizer):
    if request.param == "gpt2":
        return sharp(GPT2(small_gpt2(vocab_size=300))), bpe
    return sharp(Llama(small_config())), tokenizer


def samples(n: int = 5) -> list[Sample]:
    return [Sample(f"Text: {t}\nLabel:", " positive", i % 2) for i, t in enumerate(TEXTS[:n])]


@pytest.mark.parametrize("by", ["generation", "likelihood"])
def test_a_ragged_batch_predicts_what_each_row_alone_does(both, by):
    model, tokenizer = both
    together = predict_labels(model.double(), tokenizer, samples(), LABELS, by)
    alone = [predict_labels(model, tokenizer, [s], LABELS, by, 1)[0] for s in samples()]
    assert [p.label for p in together] == [p.label for p in alone]
    for a, b in zip(together, alone, strict=True):
        assert a.answer == (b.answer if by == "generation" else pytest.approx(b.answer, abs=1e-5))


def test_predictions_come_in_the_samples_order_and_again_the_same(both):
    model, tokenizer = both
    first = predict_labels(model, tokenizer, samples(), LABELS, "likelihood", 2)
    assert first == predict_labels(model, tokenizer, samples(), LABELS, "likelihood", 2)
    back = predict_labels(model, tokenizer, samples()[::-1], LABELS, "likelihood", 2)[::-1]
    assert [p.answer for p in back] == [pytest.approx(p.answer, abs=1e-4) for p in first]


def test_the_likelihood_of_a_label_is_the_product_over_its_tokens(both):
    model, tokenizer = both
    (found,) = predict_labels(model, tokenizer, samples(1), LABELS, "likelihood")
    for label, score in zip(LABELS, found.answer, strict=True):
        row = label_row(tokenizer, samples(1)[0].prompt, label)
        logs = model(row.tokens[None]).log_softmax(-1)[0]
        terms = [logs[i - 1, t] for i, t in enumerate(row.labels.tolist()) if t != -100]
        assert score == pytest.approx(float(sum(terms)), abs=1e-4)


def test_only_the_labels_own_tokens_are_scored(both):
    _, tokenizer = both
    row = label_row(tokenizer, "Text: the cat\nLabel:", "positive")
    scored = row.tokens[row.labels != -100].tolist()
    assert tokenizer.decode(scored).strip() == "positive"


def test_a_token_that_straddles_the_border_counts_as_the_labels(bpe):
    """The prompt ends in a space that the joined text gives to the label's first token."""
    row = label_row(bpe, "on the cat sat on ", "the")
    scored = row.tokens[row.labels != -100].tolist()
    assert bpe.decode(scored).strip() == "the"


def test_log_probabilities_of_a_padded_batch_equal_those_of_single_rows(both):
    from minillm.data.batches import collate

    model, tokenizer = both
    rows = [label_row(tokenizer, s.prompt, "positive") for s in samples()]
    batch = sequence_logprobs(model.double(), collate(rows, tokenizer.pad_id))
    single = [sequence_logprobs(model, collate([row], tokenizer.pad_id)) for row in rows]
    torch.testing.assert_close(batch, torch.cat(single), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "label"),
    [(" positive", 1), ("negative", 0), (" Positive\n", 1), ("", NONE), (" positive film", NONE),
     ("positive.", NONE), ("1", NONE), ("not negative", NONE)],
)  # fmt: skip
def test_only_a_label_and_nothing_else_is_a_label(text, label):
    assert read_label(text, LABELS).label == label


def test_predicting_leaves_the_mode_as_it_was(both):
    model, tokenizer = both
    for mode in (True, False):
        model.train(mode)
        for by in ("generation", "likelihood"):
            predict_labels(model, tokenizer, samples(1), LABELS, by)
        assert model.training is mode


def test_a_prompt_without_room_in_the_context_counts_as_wrong_alone(both, capsys):
    model, tokenizer = both
    long = Sample("cat " * 200 + "Label:", " positive", 1)
    for by in ("generation", "likelihood"):
        found = predict_labels(model, tokenizer, [long, *samples()], LABELS, by)
        assert found[0].label == NONE
        assert found[1:] == predict_labels(model, tokenizer, samples(), LABELS, by)
    assert "do not fit" in capsys.readouterr().err


def test_a_prompt_that_leaves_room_for_the_new_tokens_is_answered(both, capsys):
    model, tokenizer = both
    sample = samples(1)[0]
    short = len(tokenizer.encode(sample.prompt, bos=True)) + 2
    model.config = replace(model.config, max_seq_len=short)
    found = predict_labels(model, tokenizer, [sample], LABELS, max_new_tokens=2)
    assert found[0].answer and "do not fit" not in capsys.readouterr().err


def test_drawn_labels_depend_on_the_row_and_not_on_the_batch(tokenizer):
    model, samples = Llama(small_config()), [Sample("Say it.", " x")] * 6
    found = [predict_labels(model, tokenizer, samples, ("a", "b"), batch_size=n, seed=1,
                            temperature=1.0) for n in (1, 2, 6)]  # fmt: skip
    assert found[0] == found[1] == found[2]
    assert len({label.answer for label in found[0]}) == 6


def test_the_likelihood_of_a_label_has_no_dropout(bpe):
    model, samples = sharp(GPT2(small_gpt2(vocab_size=300))), [Sample("the cat", "")] * 2
    want = predict_labels(model.eval(), bpe, samples, ("a", "the"), "likelihood")
    model.train().dropout = 0.5
    found = predict_labels(model, bpe, samples, ("a", "the"), "likelihood")
    assert [f.answer for f in found] == [pytest.approx(w.answer) for w in want]


def test_a_prompt_with_room_for_the_shorter_label_alone_counts_as_wrong(bpe):
    labels, prompt = ("a", "zq zq zq zq"), "the cat"
    lengths = [len(label_row(bpe, prompt, label).tokens) for label in labels]
    assert lengths[0] < lengths[1]
    for context, fits in ((lengths[1], True), (lengths[1] - 1, False)):
        model = GPT2(small_gpt2(vocab_size=300, max_seq_len=context))
        (found,) = predict_labels(model, bpe, [Sample(prompt, "")], labels, "likelihood")
        assert (found.label != NONE) is fits
