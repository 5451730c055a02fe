"""minillm.plots: what the pictures show adds up."""

import pytest
from matplotlib.figure import Figure

from minillm.plots import at_peak, plot_run

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


@pytest.mark.parametrize(("before", "line"), [(None, [(5, 2.0)]), (4.0, [(0, 4.0), (5, 2.0)])])
def test_a_held_out_loss_is_drawn_from_before_training_on(before, line, tmp_path, monkeypatch):
    rows, drawn = [{"step": 1, "loss": 3.0}, {"step": 5, "loss": 2.5, "held_out_loss": 2.0}], []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: drawn.extend(figure.axes))
    plot_run(rows, tmp_path / "loss.png", before=before, per="pair")
    (axes,) = drawn
    curves = {curve.get_label(): [*zip(*curve.get_data(), strict=True)] for curve in axes.lines}
    assert curves == {"training": [(1, 3.0), (5, 2.5)], "held out": line}
    assert axes.get_ylabel() == "loss, nats per pair"
