"""ROUGE, intervals, copies: against the library, brute force, and what they must not do."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from minillm.text_metrics import (
    ROUGE,
    distinct,
    longest_shared,
    mean_with_interval,
    rouge,
    rouge_report,
)

WORDS = ("the", "cat", "cats", "sat", "ran", "running", "mat", "mats", ".", ",", "It's", "on")


def texts(n: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        "\n".join(" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(3))
        for _ in range(n)
    ]


@pytest.mark.parametrize("stemmer", [True, False])
def test_rouge_is_rouge_score_with_the_reference_first(stemmer):
    answers, references = texts(20, 1), texts(20, 2)
    scorer = RougeScorer([*ROUGE], use_stemmer=stemmer)
    found = rouge(answers, references, stemmer)
    for i, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        want = scorer.score(target=reference, prediction=answer)
        assert all(found[kind][i] == want[kind].fmeasure for kind in ROUGE)


def test_an_empty_answer_scores_0_and_stays_in():
    report = rouge_report(["", "the cat sat"], ["the cat sat", "the cat sat"])
    assert all(report[kind]["mean"] == 0.5 for kind in ROUGE)


def test_an_interval_holds_its_mean_and_narrows_with_more_rows():
    few, many = mean_with_interval([0.0, 1.0] * 10), mean_with_interval([0.0, 1.0] * 1000)
    for found in (few, many):
        low, high = found["interval_95"]
        assert low < found["mean"] == 0.5 < high
    assert many["interval_95"][1] < few["interval_95"][1]
    assert many["interval_95"] == pytest.approx([0.5 - 0.0219, 0.5 + 0.0219], abs=0.003)


def test_an_interval_is_the_same_every_time():
    values = [random.Random(1).random() for _ in range(50)]
    assert mean_with_interval(values) == mean_with_interval(values)


def test_the_longest_shared_piece_is_that_of_brute_force():
    draw = random.Random(3)
    for _ in range(50):
        text, corpus = ("".join(draw.choices("abc", k=n)) for n in (20, 60))
        pieces = {text[i:j] for i in range(20) for j in range(i, 21)}
        want = max(len(piece) for piece in pieces if piece in corpus)
        found = longest_shared(text, corpus)
        assert len(found) == want and found in corpus and found in text


def test_distinct_counts_different_pairs_of_words():
    assert distinct(["a b c", "x"]) == 1.0
    assert distinct(["a b a b a"]) == 0.5
    assert distinct([""]) == 1.0
