"""minillm.plots: what the pictures show adds up."""

import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from minillm.plots import at_peak, plot_accuracies, plot_run

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


def test_the_line_of_one_label_for_all_is_where_the_commonest_label_scores(tmp_path, monkeypatch):
    report = {"accuracy": 0.9, "interval_95": [0.8, 0.95], "majority_baseline": 0.7}
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: drawn.extend(figure.axes))
    results = {"no tuning": {"best": {"report": report}}} | {
        title: {"best": {"report": report}, "last": {"report": report}} for title in "ab"
    }
    plot_accuracies(results, tmp_path / "accuracy.png")
    (line,) = [line for line in drawn[0].lines if line.get_label() == "one label for all"]
    assert {*line.get_xdata()} == {0.7}


def test_ctrl_c_in_the_import_of_matplotlib_waits_for_its_end(tmp_path):
    # the importer itself asks for the signal, as Ctrl-C may come at any of its files
    script = tmp_path / "draw.py"
    script.write_text(
        "import signal, sys\n"
        "from minillm import plots\n"
        "from minillm.errors import friendly_errors\n"
        "class Early:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'matplotlib.colors':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Early())\n"
        "with friendly_errors():\n"
        "    try:\n"
        "        plots.plot_run([], 'never.png')\n"
        "    finally:\n"
        "        print('matplotlib.colors' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "True\n")
    assert "Traceback" not in done.stderr and not (tmp_path / "never.png").exists()
