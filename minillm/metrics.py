"""What a table reports, with how sure one can be: accuracy, its interval, a paired test."""

import math
from collections.abc import Sequence

NONE = -1  # the label of an answer that is none of the labels


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which stays within 0 and 1."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share, shrink = correct / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # the ends are exactly 0 and 1 there, which rounding would miss
    low = 0.0 if correct == 0 else middle - half
    return low, 1.0 if correct == n else middle + half


def classification_report(
    predicted: Sequence[int], truth: Sequence[int], labels: Sequence[str]
) -> dict:
    """Accuracy with its 95 % interval, beside what always giving the commonest label would score.

    A prediction of NONE counts as wrong. `confusion` has a row per true label and a column per
    predicted one, the last column for none of them.
    """
    n = len(truth)
    correct = sum(p == t for p, t in zip(predicted, truth, strict=True))
    columns = [*range(len(labels)), NONE]
    pairs = list(zip(truth, predicted, strict=True))
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / max(1, n),
        "interval_95": list(wilson_interval(correct, n)),
        "majority_baseline": max(truth.count(label) for label in range(len(labels))) / max(1, n),
        "unparseable": predicted.count(NONE),
        "unparseable_share": predicted.count(NONE) / max(1, n),
        "labels": list(labels),
        "confusion": [[pairs.count((t, p)) for p in columns] for t in range(len(labels))],
    }


def describe(report: dict) -> str:
    """One line of a classification report."""
    low, high = report["interval_95"]
    return (
        f"accuracy {report['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}, "
        f"n = {report['n']}); majority label {report['majority_baseline']:.2%}; "
        f"unparseable {report['unparseable_share']:.2%}"
    )


def paired_test(a: Sequence[bool], b: Sequence[bool]) -> dict:
    """McNemar's exact test of two predictors on the same rows (McNemar 1947).

    a, b: which rows each got right. `p_value`: how often rows that only one of the two got right
    would part this unevenly by chance alone (two-sided binomial, one half each).
    """
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n if n else 1.0
    return {"only_first": only_a, "only_second": only_b, "p_value": min(1.0, 2 * tail)}
