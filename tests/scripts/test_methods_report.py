"""The comparison's and the sweep's lines: each number is of the runs it stands for."""

import csv
import statistics

import pytest

from minillm.errors import UserError
from minillm.metrics import paired_test
from minillm.plots import plot_held_out
from minillm.runs import read_metrics
from minillm.text_metrics import ROUGE, mean_with_interval
from tools import sweep, sweep_report
from tools.cells import done_once, open_experiment, run_script, write_report
from tools.compare_methods import search
from tools.methods_report import (
    at_the_edge,
    behind_the_best,
    interval_text,
    method_row,
    other_rows,
    summarize,
)


def run(loss: float, scores: list[float], copied: str = "abc") -> dict:
    return {
        "report": {"loss": loss, "perplexity": 2 * loss, "stopped_share": 0.5, "n": len(scores),
                   "mean_tokens": 10 * loss, "longest_shared": copied,
                   "baselines": {"lead-3": {kind: mean_with_interval(scores) for kind in ROUGE}}},
        "rouge": {kind: scores for kind in ROUGE}, "eval_seconds": 7.0, "saved_bytes": 12_340,
        "summary": {"trainable": 2000, "parameters": 16_000, "steps": 10, "tokens": 300,
                    "seconds": 4 * loss, "flops": 3e12 * loss, "method": "a method",
                    "memory_mib": {"peak": 100 * loss}},
    }  # fmt: skip


def test_a_methods_line_is_the_mean_of_its_seeds():
    row = method_row("lora", 1e-3, [run(1.0, [0.2, 0.4, 0.9]), run(3.0, [0.6, 0.8, 0.9], "abcde")])
    assert row["test loss"] == f"2.000 ± {statistics.stdev([1.0, 3.0]):.3f}" != "2.000 ± 1.000"
    assert (row["perplexity"], row["tokens"], row["peak MiB"]) == ("4.00", "20.0", "200")
    assert (row["train s"], row["test s"], row["TFLOP"]) == ("8.0", "7.0", "6.00")
    assert (row["% of all"], row["saved, kB"]) == ("12.500", "12.3")
    assert row["longest copy, characters"] == 5
    # ROUGE: first over a row's seeds, then over the rows, of which there are three
    assert row["rougeL"] == interval_text(mean_with_interval([0.4, 0.6, 0.9]))
    assert method_row("lora", 1e-3, [run(1.0, [0.2])])["test loss"] == "1.000"


def test_methods_are_held_against_the_best_row_by_row():
    """The difference is the same for each row, however much the rows differ."""
    rows = [0.1, 0.5, 0.9, 0.3]
    runs = {"lora": [run(1.0, [r - 0.05 for r in rows])], "full": [run(1.0, rows), run(1.0, rows)]}
    assert behind_the_best(runs) == {"lora": "-5.0 (-5.0 to -5.0)", "full": "the best"}


def test_baselines_and_the_untuned_model_stand_above():
    rows = other_rows(run(1.5, [0.1, 0.3]))
    assert [row["method"] for row in rows] == ["lead-3", "no tuning"]
    assert rows[0]["rouge1"] == rows[1]["rouge1"] == interval_text(mean_with_interval([0.1, 0.3]))
    assert rows[1]["test loss"] == "1.500"


@pytest.mark.parametrize(("best", "is_edge"), [(1e-4, True), (1e-3, False), (1e-2, True)])
def test_a_best_rate_at_the_grids_edge_is_told(best, is_edge):
    losses = {"0.001": 2.0, "0.0001": 1.0, "0.01": None}
    assert bool(at_the_edge({"lr": best, "losses": losses})) == is_edge
    assert not at_the_edge({"lr": best, "losses": {f"{best:g}": 1.0}})


@pytest.mark.parametrize(("fitting", "told"), [(2, False), (1, True)])
def test_the_report_tells_what_was_trained_on_and_of_how_many_a_loss_is(fitting, told, tmp_path):
    (tmp_path / "lora-seed4").mkdir()
    (tmp_path / "lora-seed4" / "metrics.jsonl").write_text('{"step": 1, "held_out_loss": 2.0}\n')
    runs, chosen = {"lora": [run(1.0, [0.5, 0.6])]}, {"lora": {"lr": 1e-3, "losses": {}}}
    runs["lora"][0]["summary"]["data"] = {"train": "7 samples, 2 dropped"}
    untuned = run(2.0, [0.1, 0.2])
    untuned["report"]["loss_n"] = fitting
    summarize(tmp_path, untuned, chosen, runs, {}, seed=4)
    report = (tmp_path / "report.md").read_text()
    assert "- train: 7 samples, 2 dropped\n" in report
    assert ("of the 1 samples that have room in --max-length" in report) is told


def test_the_curves_are_those_of_the_first_seed(tmp_path, capsys):
    line = '{"step": 1, "held_out_loss": 2.0}\n{"step": 2, "held_out_loss": 1.0}\n'
    (tmp_path / "lora-seed4").mkdir()
    (tmp_path / "lora-seed4" / "metrics.jsonl").write_text(line)
    runs, chosen = {"lora": [run(1.0, [0.5, 0.6])]}, {"lora": {"lr": 1e-3, "losses": {}}}
    summarize(tmp_path, run(2.0, [0.1, 0.2]), chosen, runs, {}, seed=4)
    assert "(none searched)" in capsys.readouterr().out
    plot_held_out({"lora": read_metrics(tmp_path / "lora-seed4" / "metrics.jsonl")},
                  tmp_path / "want.png")  # fmt: skip
    assert (tmp_path / "loss.png").read_bytes() == (tmp_path / "want.png").read_bytes()


def test_the_best_rate_is_the_one_that_held_out_data_prefers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys, pathlib\n"
        "value = lambda flag: sys.argv[sys.argv.index(flag) + 1]\n"
        "lr, folder = float(value('--lr')), pathlib.Path(value('--out-dir'))\n"
        "folder.mkdir()\n"
        "if lr > 1: sys.exit(3)\n"
        "found = {'held_out_before': 9 - lr, 'held_out_best': (lr - 0.01) ** 2 + 1}\n"
        "(folder / 'summary.json').write_text(json.dumps(found))\n"
    )
    found = search(tmp_path, script, "lora", [1e-3, 1e-2, 0.5, 2.0], [])
    assert found["lr"] == 1e-2 and [*found["losses"]] == ["0.001", "0.01", "0.5", "2.0"]
    assert found["losses"]["2.0"] is None and found["losses"]["0.01"] == 1.0
    with pytest.raises(UserError, match="no rate of 3.0, 4.0 trains"):
        search(tmp_path, script, "lora", [3.0, 4.0], [])


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_was_cut_goes_on(begun, tmp_path):
    script, cell = tmp_path / "script.py", tmp_path / "cell"
    script.write_text("import sys; print(sys.argv[1:])")
    cell.mkdir()
    if begun:
        (cell / "metrics.jsonl").touch()
        (cell / "config.json").touch()
    run_script(script, cell, ["--lr", "1"])
    want = ["--out-dir", str(cell), "--lr", "1", *(["--resume"] if begun else [])]
    assert (tmp_path / "cell.log").read_text().strip() == str(want)


def test_an_experiment_goes_on_with_its_own_settings_alone(tmp_path):
    open_experiment(tmp_path / "e", {"lr": 1, "rows": 8})
    open_experiment(tmp_path / "e", {"lr": 1, "rows": 8})
    later = {"a flag": None, "a switch": False}  # that did not exist, and are not given
    open_experiment(tmp_path / "e", {"lr": 1, "rows": 8} | later)
    with pytest.raises(UserError, match="other settings"):
        open_experiment(tmp_path / "e", {"lr": 2, "rows": 8})


def test_what_was_done_is_read_and_not_done_again(tmp_path):
    assert done_once(tmp_path / "a.json", lambda: {"n": 1}) == {"n": 1}
    assert done_once(tmp_path / "a.json", lambda: {"n": 2}) == {"n": 1}


def test_rows_with_other_keys_stand_under_their_own_columns(tmp_path):
    rows = [{"b": 1, "a": None}, {"a": 2.0, "b": "x", "c": 3}]
    write_report(tmp_path, "T", "", rows, {}, [])
    assert [*csv.DictReader((tmp_path / "table.csv").open())] == [
        {"a": "", "b": "1", "c": ""}, {"a": "2", "b": "x", "c": "3"}
    ]  # fmt: skip


def test_rank_stabilized_lora_counts_alpha_over_the_root_of_the_rank():
    assert sweep.scale_of({"rank": 16, "alpha": 64}) == 4
    assert sweep.scale_of({"rank": 16, "alpha": 64, "rslora": True}) == 16
    assert sweep.scale_of({"rank": 0, "alpha": 64}) is None


def swept(best: list[bool], last: list[bool]) -> dict:
    """A cell of a sweep, by which rows its checkpoints got right."""
    return {name: {"right": right, "report": {"accuracy": sum(right) / len(right),
                                              "interval_95": [0.1, 0.9], "n": len(right),
                                              "unparseable_share": 0.25}}
            for name, right in (("best", best), ("last", last)) if right}  # fmt: skip


def test_a_cell_is_tested_against_the_first_cells_same_checkpoint():
    ups, downs, mixed = [True] * 12, [False] * 12, [True, False] * 6
    results = {"no tuning": swept(downs, []), "a": swept(ups, mixed), "b": swept(mixed, ups)}
    rows = {(row["cell"], row["checkpoint"]): row for row in sweep_report.table(results)}
    assert [*rows] == [("no tuning", "best"), ("a", "best"), ("a", "last"), ("b", "best"),
                       ("b", "last")]  # fmt: skip
    assert rows["a", "best"]["p against first"] is rows["a", "last"]["p against first"] is None
    assert rows["b", "best"]["p against first"] == paired_test(mixed, ups)["p_value"]
    assert rows["b", "last"]["p against first"] == paired_test(ups, mixed)["p_value"]
    assert rows["no tuning", "best"]["p against first"] == paired_test(downs, ups)["p_value"]
    assert rows["b", "best"]["accuracy"] == "50.00%"


def test_every_cell_of_a_sweep_trains_as_its_title_says():
    cells = sweep.plan([8, 32, 64], [1e-3, 2e-3, 3e-3], ["one", "two"], ["--lr", "1e-4"])
    assert {title: " ".join(flags) for title, flags in cells.items()} == {
        "LoRA r 8, alpha 32": "--rank 8 --alpha 32 --template one --lr 0.001",
        "LoRA r 32, alpha 128": "--rank 32 --alpha 128 --template one --lr 0.002",
        "LoRA r 64, alpha 256": "--rank 64 --alpha 256 --template one --lr 0.003",
        "full fine-tuning": "--rank 0 --template one --lr 1e-4",
        "LoRA r 8, alpha 128": "--rank 8 --alpha 128 --template one --lr 0.001",
        "LoRA r 32, prompt two": "--rank 32 --alpha 128 --template two --lr 0.002",
    }


def test_flags_of_full_fine_tuning_given_come_before_the_bundled_models_own():
    assert sweep.own_flags("tiny-gpt2", 3, None, "", "--lr 5e-4")[2] == ["--lr", "5e-4"]
    assert sweep.own_flags("tiny-gpt2", 3, None, "", None)[2] != ["--lr", "5e-4"]


@pytest.mark.parametrize(("flags", "is_rate"), [
    ("--lr 5e-4", True), ("--learning_rate=5e-4", True), ("--weight-decay 0", False),
    ("--config run.json", True),
])  # fmt: skip
def test_a_rate_for_all_runs_of_a_sweep_is_the_ranks_too(flags, is_rate, tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text('{"lr": 5e-4}')
    monkeypatch.chdir(tmp_path)
    lrs, train, _ = sweep.own_flags("tiny-gpt2", 3, None, flags, None)
    assert train[-len(flags.split()) :] == flags.split()
    assert (lrs is None) is is_rate


def test_a_sweep_over_seeds_takes_all_cells_for_each():
    assert sweep.over_seeds({"a": ["--rank", "1"], "b": ["--rank", "2"]}, [3, 11]) == {
        "a, seed 3": ["--rank", "1", "--seed", "3"], "b, seed 3": ["--rank", "2", "--seed", "3"],
        "a, seed 11": ["--rank", "1", "--seed", "11"],
        "b, seed 11": ["--rank", "2", "--seed", "11"],
    }  # fmt: skip


def test_cells_are_compared_within_a_seed_and_averaged_over_them():
    ups, downs, mixed = [True] * 12, [False] * 12, [True, False] * 6
    results = {"no tuning": swept(downs, []), "a, seed 3": swept(ups, mixed),
               "b, seed 3": swept(mixed, ups), "a, seed 11": swept(downs, downs),
               "b, seed 11": swept(ups, downs)}  # fmt: skip
    rows = {(row["cell"], row["checkpoint"]): row for row in sweep_report.table(results)}
    p = {cell: rows[cell, "best"]["p against first"] for cell in results}
    assert p["a, seed 3"] is p["a, seed 11"] is None
    assert p["no tuning"] == p["b, seed 11"] == paired_test(ups, downs)["p_value"]
    assert p["b, seed 3"] == paired_test(mixed, ups)["p_value"]
    mean = rows["b, mean of 2 seeds", "best"]
    assert (mean["accuracy"], mean["seeds from, to"]) == ("75.00%", "50.00% to 100.00%")
    assert rows["a, mean of 2 seeds", "last"]["accuracy"] == "25.00%" and len(rows) == 13


@pytest.mark.parametrize("content", ['{"rank": 3}', '{"template": "mine"}', '{"alpha": 3}'])
def test_what_each_cell_of_a_sweep_has_for_itself_is_refused_in_a_config_too(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match="every cell has its own"):
        sweep.own_flags("tiny-gpt2", 3, None, f"--config {tmp_path / 'run.json'}", None)


def test_a_sweep_over_seeds_takes_no_other_one(tmp_path):
    for flags in ("--seed 3", "--seed=3"):
        with pytest.raises(UserError, match="--seed: every run has one of --seeds"):
            sweep.main(["--out-dir", str(tmp_path / "s"), "--seeds", "1,2", "--train-flags", flags])
    with pytest.raises(UserError, match="names a seed twice"):
        sweep.parse_args(["--out-dir", str(tmp_path / "s"), "--seeds", "1,2,1"])
