"""tools/memory_table.py: the matrix of cells, its two tables, and what is never run."""

import pytest

from tests.conftest import shared
from tools import memory_table
from tools.memory_report import agreement, explanations, find, table_1, table_2
from tools.memory_table import Cell, all_cells

NAMES = ("frozen weights", "trainable weights", "gradients", "optimizer state", "activations",
         "logits", "16-bit copies of weights", "work", "total")  # fmt: skip


def memory(cell: Cell) -> dict[str, float]:
    """Figures as theory has them for 100 MiB of weights."""
    base = 50.0 if cell.stored else 100.0
    trained = 1.0 if cell.lora else 100.0
    copies = 50.0 if cell.mixed and not cell.stored else 0.0
    if cell.checkpointing:
        copies = 0.0
    activations = 80.0 * (0.75 if cell.mixed else 1) * (0.1 if cell.checkpointing else 1)
    activations /= 8 if cell.accumulation else 1
    parts = (base if cell.lora else 0.0, trained, trained, 2 * trained, activations, 8.0, copies,
             5.0)  # fmt: skip
    return dict(zip(NAMES, (*parts, sum(parts)), strict=True))


def measured(cell: Cell, shift: float = 0.0) -> dict:
    found = memory(cell)
    return {
        "predicted": found, "free": 1e6, "fits": True, "memory": {"measured": found, "peak": 200.0},
        "seconds": 40.0 if cell.checkpointing else 30.0, "tokens": 1000,
        "losses": [2.0 + shift, 1.5],
    }  # fmt: skip


@pytest.fixture
def results() -> dict:
    return {cell: measured(cell) for cell in all_cells()}


def shown(results: dict) -> dict:
    return {cell: result["memory"]["measured"] for cell, result in results.items()}


def row(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_there_are_the_courses_sixteen_cells_and_four_of_ours():
    cells = all_cells()
    assert len(cells) == len({cell.name for cell in cells}) == 20
    assert sum(not cell.stored for cell in cells) == 16
    assert all(cell.lora and cell.mixed for cell in cells if cell.stored)


def test_every_cell_has_the_same_samples_in_a_step():
    for cell in all_cells():
        flags = cell.flags(8, "bf16")
        size, steps = (int(flags[flags.index(f) + 1])
                       for f in ("--batch-size", "--accumulation-steps"))  # fmt: skip
        assert size * steps == 8


def test_table_1_says_what_theory_says(results):
    table = table_1(results, shown(results))
    assert [c[0] for c in row(table, "parameters")] == ["-", "-", "↑", "↑", "↓"]
    assert [c[0] for c in row(table, "activations")][:3] == ["↓", "↓", "↓"]
    assert [c[0] for c in row(table, "gradients")] == ["-", "-", "-", "↓", "-"]
    assert [c[0] for c in row(table, "optimizer state")] == ["-", "-", "-", "↓", "-"]
    assert row(table, "computation")[1].startswith("↑ 33")


def test_table_2_has_the_courses_columns(results):
    table = table_2(results)
    assert row(table, "GA") == ["OFF"] * 4 + ["ON"] * 4
    assert row(table, "MP") == ["OFF", "OFF", "ON", "ON"] * 2
    assert row(table, "LoRA") == ["OFF", "ON"] * 4
    assert row(table, "Peak, checkpointing off") == ["200"] * 8
    assert row(table, "Base in 16 bits: tensors, off").count("") == 6


def test_what_does_not_fit_is_marked_and_what_is_predicted_too(results):
    cell = Cell(False, False, False, False)
    other = Cell(False, False, True, False)
    results[cell] = {"predicted": memory(cell), "free": 10.0, "fits": False}
    results[other] = {"predicted": memory(other), "free": 1e6, "fits": True}
    first, second, *_ = row(table_2(results), "Tensors, checkpointing off")
    assert first == "x 493 p" and second == "197 p"


def test_a_time_that_was_not_measured_is_not_told_as_unchanged(results):
    predicted = {c: {"predicted": memory(c), "free": 1e6, "fits": True} for c in results}
    table = table_1(predicted, {c: memory(c) for c in results})
    assert row(table, "computation") == ["not measured"] * 5


def test_a_cell_that_ran_out_of_memory_is_a_result(results):
    cell = Cell(False, False, False, False)
    results[cell] = {"predicted": memory(cell), "free": 600.0, "fits": True, "failed": "out of"}
    table = table_2(results)
    assert row(table, "Tensors, checkpointing off")[0].startswith("x 493")
    assert row(table, "Peak, checkpointing off")[0] == "x"
    assert row(table, "Run time, s, checkpointing off")[0] == "x"


def test_the_explanations_name_the_copies_that_autocast_makes(results):
    text = explanations(results, shown(results))
    assert "copy of every matrix it meets and keeps it for backward, 50.0 MiB" in text
    assert "frozen weights 100.0 to 50.0 MiB" in text


def test_losses_that_part_are_told(results):
    cell = find(results, Cell(False, False, True, False), checkpointing=True)
    results[cell] = measured(cell, shift=0.25)
    lines = [line for line in agreement(results) if "2.5e-01" in line]
    assert lines == ["Losses of the 4 cells in fp32, LoRA: at most 2.5e-01 apart at any step; "
                     "THEY DO NOT AGREE."]


@pytest.mark.slow
def test_predicting_runs_nothing_and_counts_the_models_own_weights(tmp_path, capsys):
    flags = ["--predict", "--layers", "2", "--samples", "8", "--out-dir", str(tmp_path / "m")]
    results = memory_table.main(flags)
    assert len(results) == 20 and not any("memory" in result for result in results.values())
    assert not [path for path in (tmp_path / "m").iterdir() if path.is_dir()]
    assert "Table 2" in capsys.readouterr().out
    for cell, result in results.items():
        found = result["predicted"]
        weights = found["frozen weights"] + found["trainable weights"]
        assert weights > (2.25 if cell.stored else 4.5)  # 1,180,608 numbers in MiB


@pytest.mark.slow
def test_what_would_not_fit_is_not_run(tmp_path):
    """Seventy billion parameters, on whatever machine this is."""
    flags = ["--init", "llama-2-70b", "--tokenizer", str(shared("llama2_tokenizer.model"))]
    results = memory_table.main([*flags, "--samples", "8", "--out-dir", str(tmp_path / "m")])
    assert not any(result["fits"] for result in results.values())
