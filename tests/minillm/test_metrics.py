"""Intervals and tests against values computed by hand or by enumeration."""

import itertools
import math

import pytest

from minillm.metrics import NONE, classification_report, describe, paired_test, wilson_interval


def test_the_interval_of_a_known_share():
    low, high = wilson_interval(8, 10)  # Wilson's, from the textbook formula
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = wilson_interval(938, 1066)
    assert (high - low) / 2 == pytest.approx(0.0195, abs=5e-4)  # the course's plus or minus 2


def test_the_interval_stays_within_zero_and_one():
    for n in range(1, 300):
        assert wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] == 1
    assert wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_interval_covers_the_true_share_about_95_times_in_100(p):
    n = 60
    covered = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if wilson_interval(k, n)[0] <= p <= wilson_interval(k, n)[1]
    )
    assert 0.92 < covered < 0.985


def test_a_report_counts_garbage_as_wrong_and_tells_its_share():
    report = classification_report([0, 1, NONE, 1], [0, 1, 1, 0], ("neg", "pos"))
    assert (report["correct"], report["accuracy"], report["unparseable_share"]) == (2, 0.5, 0.25)
    assert report["confusion"] == [[1, 1, 0], [0, 1, 1]] and report["majority_baseline"] == 0.5
    assert "n = 4" in describe(report) and "unparseable 25.00%" in describe(report)


def test_the_paired_test_is_the_share_of_coin_tosses_at_least_as_uneven():
    a = [True] * 9 + [False] * 3 + [True] * 20
    b = [False] * 9 + [True] * 3 + [True] * 20
    tosses = itertools.product((0, 1), repeat=12)
    uneven = sum(abs(sum(toss) - 6) >= 3 for toss in tosses) / 2**12
    result = paired_test(a, b)
    assert (result["only_first"], result["only_second"]) == (9, 3)
    assert result["p_value"] == pytest.approx(uneven)


def test_equal_predictors_have_nothing_to_tell_them_apart():
    assert paired_test([True, False], [True, False])["p_value"] == 1


def test_the_majority_is_that_of_the_truth_not_of_the_predictions():
    report = classification_report([0, 0, 0, 0, 1], [1, 1, 1, 0, 0], ("neg", "pos"))
    assert report["majority_baseline"] == 0.6
    assert report["confusion"] == [[1, 1, 0], [3, 0, 0]]
