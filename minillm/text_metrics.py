"""How good written text is: ROUGE with its conventions stated, intervals, copying, repetition."""

from collections.abc import Sequence

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
CONVENTION = (
    "rouge-score, F-measure, Porter stemmer on; rougeL takes the whole text as one sentence, "
    "rougeLsum a newline as the end of one; an empty answer scores 0 and stays in; mean over rows, "
    "95 % interval from 1,000 bootstrap samples of the rows"
)


def rouge(
    answers: Sequence[str], references: Sequence[str], stemmer: bool = True
) -> dict[str, list[float]]:
    """F-measures of each answer, by kind (Lin 2004), as the rouge-score package computes them."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, use_stemmer=stemmer)
    pairs = zip(references, answers, strict=True)
    scores = [scorer.score(reference, answer) for reference, answer in pairs]
    return {kind: [score[kind].fmeasure for score in scores] for kind in ROUGE}


def mean_with_interval(values: Sequence[float], seed: int = 0) -> dict:
    """The plain mean and its 95 % bootstrap interval over rows (Efron 1979), by percentiles."""
    values = np.asarray(values, dtype=np.float64)
    stream = np.random.default_rng(seed)
    drawn = stream.integers(len(values), size=(1000, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "interval_95": [float(low), float(high)]}


def rouge_report(answers: Sequence[str], references: Sequence[str]) -> dict[str, dict]:
    """Mean and interval of each kind of ROUGE."""
    by_kind = rouge(answers, references)
    return {kind: mean_with_interval(scores) for kind, scores in by_kind.items()}


def longest_shared(text: str, corpus: str) -> str:
    """The longest piece of a text that stands in the corpus letter for letter."""
    best, place = 0, 0
    for start in range(len(text)):
        while start + best < len(text) and text[start : start + best + 1] in corpus:
            best, place = best + 1, start
    return text[place : place + best]


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Share of different ones among all n-grams of words (Li et al. 2016), 1 where there are none:
    low where texts repeat themselves or each other."""
    grams = []
    for text in texts:
        words = text.split()
        grams += zip(*(words[i:] for i in range(n)), strict=False)
    return len(set(grams)) / len(grams) if grams else 1.0
