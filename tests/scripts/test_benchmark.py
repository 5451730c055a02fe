"""tools/benchmark.py: both engines on the same weights, taking turns."""

import json
import statistics

import pytest

from minillm.data.batches import Row
from minillm.errors import UserError
from minillm.losses import IGNORED
from tools import benchmark
from tools.engines import Setup
from tools.match import Match, Worker
from tools.models import family_of_preset


def test_the_ratio_is_above_one_where_minillm_is_better():
    """The median over turns, each turn's two figures against one another."""
    speeds = {"minillm": [20.0, 30.0, 40.0], "transformers": [10.0, 15.0, 99.0]}
    row = benchmark.compare("decode", "fp32", "tokens/s", speeds, 0.5)
    assert row["minillm"] == 30 and row["transformers"] == 15 and row["ratio"] == 2
    waits = benchmark.compare("wait", "fp32", "ms", speeds, 0.5, less=True)
    assert waits["ratio"] == 0.5


def test_alone_minillm_is_ahead_of_nobody():
    row = benchmark.compare("decode", "fp32", "tokens/s", {"minillm": [1.0]}, None)
    assert "ratio" not in row and row["minillm"] == statistics.median([1.0])


@pytest.mark.parametrize(("masked", "labelled"), [(0.0, 256), (0.5, 128), (0.54, 118)])
def test_rows_carry_the_labels_that_were_asked_for(masked, labelled):
    family = family_of_preset("gpt2")
    (rows,) = benchmark.training_rows(None, None, family, masked, 256, 8, 50257)
    assert len(rows) == 8 and all(isinstance(row, Row) for row in rows)
    for row in rows:  # what is fed is all but the last token
        assert len(row.tokens) == 257 and int((row.labels[1:] != IGNORED).sum()) == labelled


def test_an_unknown_part_is_named(tmp_path):
    with pytest.raises(UserError, match="'speed' is unknown; choose from decode, context, train"):
        benchmark.main(["--parts", "speed", "--out-dir", str(tmp_path)])


def test_an_unknown_size_is_named():
    with pytest.raises(UserError, match="gpt-5: no published size of that name"):
        family_of_preset("gpt-5")


@pytest.mark.parametrize(("flags", "message"), [
    (["--init", "gpt2", "--layers", "99"], "12 layers"),
    (["--init", "gpt2", "--checkpoint", "tiny-gpt2"], "contradict"),
])  # fmt: skip
def test_weights_that_are_not_there_to_measure_are_refused(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        benchmark.main(["--out-dir", str(tmp_path), *flags])


@pytest.mark.slow
def test_an_engine_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        Match(Setup(tmp_path / "nothing", None, "fp32", "cpu", ("c_attn",))).__enter__()


def test_a_process_that_dies_is_told(tmp_path):
    with pytest.raises(UserError, match="ended"):
        worker = Worker("minillm", Setup(tmp_path, None, "fp32", "cpu", ("c_attn",)))
        worker.process.terminate()
        worker.process.join()
        worker.ask("facts")
    worker.close()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny-gpt2", "tiny-llama"])
def test_both_engines_are_measured_on_the_same_weights(preset, tmp_path, capsys):
    flags = ["--init", preset, "--parts", "decode,context,train", "--precision", "fp32"]
    small = ["--decode", "8,4", "--contexts", "16,32", "--tokens", "32", "--rows", "2"]
    benchmark.main([*flags, *small, "--repeats", "2", "--out-dir", str(tmp_path)])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads((tmp_path / "results.json").read_text())
    assert last["machine"] == kept["machine"] and last["limits"]["fp32"]["read"] > 0
    assert {row["what"].split(",")[0] for row in kept["results"]} >= {"decode 8 + 4", "LoRA step"}
    assert all(row["minillm"] > 0 and len(row["samples"]["minillm"]) for row in kept["results"])
    assert (tmp_path / "decode.png").exists()
