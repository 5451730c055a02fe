"""minillm.plots: what the pictures show adds up."""

import pytest

from minillm.plots import at_peak

FOUND = {"trainable weights": 100.0, "gradients": 100.0, "activations": 80.0, "logits": 2.0,
         "16-bit copies of weights": 9.0}  # fmt: skip


@pytest.mark.parametrize("work", [5.0, 0.0, -30.0, -90.0])
def test_bars_end_at_the_total(work):
    """Also where activations were freed before the peak."""
    found = FOUND | {"work": work}
    shown = at_peak(found)
    assert sum(shown.values()) == sum(found.values()) and min(shown.values()) >= 0


def test_only_what_forward_kept_can_be_freed_before_the_peak():
    shown = at_peak(FOUND | {"work": -90.0})
    assert shown["trainable weights"] == shown["gradients"] == 100
