"""tools/memory_table.py: the matrix of cells, its two tables, and what is never run."""

from dataclasses import replace

import pytest
import torch

from llama import FAMILY
from minillm.adapt.methods import MethodOptions, adapt
from minillm.data.batches import Batches
from minillm.footprint import predict_footprint
from minillm.precision import Precision, has_native_bf16
from tests.conftest import shared
from tools import memory_table
from tools.memory_report import (
    agreement,
    by_category,
    change,
    explanations,
    find,
    line,
    rounded,
    summarize,
    table_1,
    table_2,
    title,
)
from tools.memory_table import Base, Cell, all_cells, forecast, script_flags, training_seconds
from train import finetune_llama

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


@pytest.mark.parametrize("accumulation", [True, False])
def test_a_step_of_one_sample_is_one_of_every_cell_without_accumulation(accumulation):
    cells = [cell for cell in all_cells(single=True) if cell.accumulation == accumulation]
    assert len(cells) == 10
    for cell in cells:
        flags = cell.flags(8, "bf16")
        size, steps = (int(flags[flags.index(f) + 1])
                       for f in ("--batch-size", "--accumulation-steps"))  # fmt: skip
        assert (size, steps) == (1, 8 if accumulation else 1)


def test_steps_of_one_sample_are_compared_at_the_same_micro_batch(capsys, tmp_path):
    results = {cell: measured(cell) for cell in all_cells(single=True)}
    for cell, result in results.items():
        if not cell.accumulation:
            result["losses"] = [2.0] * 16  # other steps, and eight times as many
            result["memory"]["measured"] = memory(replace(cell, accumulation=True))
    settings = {"mixed": "bf16", "rows": 8, "predict": False, "trained on": 200}
    summarize(tmp_path, results, settings, "cpu")
    text = (tmp_path / "report.md").read_text()
    assert "Grad. accumulation (same micro-batch)" in text and "one sample a step" in text
    assert row(text, "activations")[0] == "-"
    assert "are (10.0 and 10.0 MiB)" in text and "1 x 1, fp32, LoRA, checkpointed" in text
    assert text.count("they agree") == 10 and "THEY DO NOT" not in text


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


def test_every_figure_of_table_2_is_its_own_cells(results):
    for number, (cell, result) in enumerate(results.items()):
        result["memory"] = {"peak": 1000 + number, "reserved": 3000 + number,
                            "measured": memory(cell) | {"total": 2000.0 + number}}  # fmt: skip
        result["seconds"] = 100.0 + number
    table, numbers = table_2(results), {cell: i for i, cell in enumerate(results)}
    columns = [dict(zip(("accumulation", "mixed", "lora"), [word == "ON" for word in column],
                        strict=True))
               for column in zip(*(row(table, n) for n in ("GA", "MP", "LoRA")), strict=True)]
    for state, on in (("off", False), ("on", True)):
        for stored, lines in (
            (False, {f"Peak, checkpointing {state}": "1,0{:02d}",
                     f"Reserved, checkpointing {state}": "3,0{:02d}",
                     f"Tensors, checkpointing {state}": "2,0{:02d}.0",
                     f"Run time, s, checkpointing {state}": "1{:02d}.0"}),
            (True, {f"Base in 16 bits: tensors, {state}": "2,0{:02d}.0",
                    f"Base in 16 bits: run time, {state}": "1{:02d}.0"}),
        ):  # fmt: skip
            cells = [Cell(checkpointing=on, stored=stored, **column) for column in columns]
            for name, form in lines.items():
                assert row(table, name) == [form.format(numbers[cell]) if cell in numbers else ""
                                            for cell in cells]  # fmt: skip


def test_an_arrow_is_of_the_median_pair():
    assert change([1.0, 1.0, 1.0], [1.0, 1.0, 4.0], 0.005) == "-"
    assert change([2.0, 2.0, 2.0], [1.0, 3.0, 3.0], 0.005) == "↑ 50.0% (-50% to +50%)"
    assert change([2.0, 2.0], [1.0, 1.0], 0.005) == "↓ 50.0%"


def test_our_base_in_16_bits_changes_nothing_that_table_1_says_of_the_others(results):
    before = table_1(results, shown(results))
    for cell, result in results.items():
        if cell.stored:
            result["memory"]["measured"] = {name: 7000.0 for name in NAMES}
            result["seconds"] = 9000.0
    after = table_1(results, shown(results))
    assert [line.split("|")[1:-2] for line in after.splitlines()] == [
        line.split("|")[1:-2] for line in before.splitlines()]  # fmt: skip
    assert after != before


def test_copies_that_autocast_makes_count_where_they_are_the_point(results):
    parameters = row(table_1(results, shown(results)), "parameters")
    # frozen 100 + trained 1 + copies 50 (none where checkpointed) to 50 + 1: the median of two each
    assert parameters[4] == f"↓ {1 - (51 / 151 + 51 / 101) / 2:.1%}"


def test_16_bits_may_part_by_more_than_fp32_and_bases_in_16_bits_are_told_apart(results):
    for cell, result in results.items():
        result["losses"] = [2.0 + (0.05 if cell.checkpointing else 0) + cell.stored, 1.5]
    verdicts = {line.partition(":")[0]: line.rpartition("; ")[2] for line in agreement(results)}
    assert verdicts == {
        "Losses of the 4 cells in fp32, full": "THEY DO NOT AGREE.",
        "Losses of the 4 cells in fp32, LoRA": "THEY DO NOT AGREE.",
        "Losses of the 4 cells in 16 bits, full": "they agree.",
        "Losses of the 4 cells in 16 bits, LoRA": "they agree.",
        "Losses of the 4 cells in 16 bits, base in 16 bits, LoRA": "they agree.",
    }


def test_the_explanations_go_from_off_to_on(results):
    text = explanations(results, shown(results))
    assert "Activations shrink by 2.5 MiB. Together the peak rises by 47.5 MiB here" in text
    assert "divides the activations (80.0 to 10.0 MiB" in text
    assert "LoRA saves gradients and optimizer state, 300.0 to 3.0 MiB" in text
    assert "With checkpointing those copies come to 0.0 MiB" in text


def test_a_line_shows_what_was_measured_and_of_a_prediction_that_it_is_one(results):
    cell = Cell(True, True, True, False, True)
    found = results[cell] | {"predicted": memory(cell) | {"total": 1.0}}
    shown_line = line("x", found)
    assert (shown_line["predicted total"], shown_line["peak"]) == (1.0, 200.0)
    assert shown_line["total"] == memory(cell)["total"] and shown_line["last loss"] == 1.5
    del found["memory"]
    assert by_category(found) is None and "peak" not in line("x", found)
    assert "seconds" not in line("x", found)
    assert line("x", found | {"fits": False, "free": 1234.0})["seconds"] == "x (free: 1,234)"


def test_a_cells_title_says_what_it_is():
    assert title(Cell(True, False, False, False), "bf16", 8) == "1 x 8, fp32, full"
    assert title(Cell(False, True, True, True), "bf16", 8) == (
        "8 x 1, bf16 over fp32, LoRA, checkpointed"
    )
    assert title(Cell(False, True, True, False, True), "fp16", 4) == (
        "4 x 1, fp16, base in fp16, LoRA"
    )


def test_a_cpu_without_products_in_16_bits_says_what_mixed_precision_is_there():
    assert bool(rounded("cpu")) == (not has_native_bf16(torch.device("cpu")))
    assert rounded("cuda") == ""


@pytest.mark.parametrize(("device", "predict"), [("cpu", False), ("cpu", True), ("cuda", False)])
def test_the_report_says_what_mixed_precision_was_where_it_was_measured(
    device, predict, results, tmp_path, capsys
):
    settings = {"mixed": "bf16", "rows": 8, "predict": predict, "trained on": 200}
    summarize(tmp_path, results, settings, device)
    told = "computed in fp32 and rounded" in (tmp_path / "report.md").read_text()
    assert told == (bool(rounded(device)) and not predict)


def base(**changes) -> Base:
    known = {"family": FAMILY, "checkpoint": "tiny-llama", "preset": None, "layers": 1,
             "tokenizer": None, "task": "alpaca", "data": None, "samples": 24, "max_length": 300,
             "device": torch.device("cpu")}  # fmt: skip
    return Base(**known | changes)


@pytest.mark.parametrize("cell", all_cells(), ids=lambda cell: cell.name)
def test_the_script_is_told_what_the_cell_is(cell):
    given = base(layers=2, tokenizer="t.model", data="d.json")
    args = finetune_llama.parse_args(script_flags(given, cell, 8, "bf16", 3e-4))
    assert (args.batch_size, args.accumulation_steps) == ((1, 8) if cell.accumulation else (8, 1))
    assert args.precision == ("bf16" if cell.mixed else "fp32")
    assert args.method == ("lora" if cell.lora else "full")
    assert not cell.lora or args.frozen_dtype == ("bf16" if cell.stored else "fp32")
    assert args.gradient_checkpointing == cell.checkpointing
    assert (args.lr, args.epochs, args.lora_dropout, args.no_save) == (3e-4, 1, 0.0, True)
    assert (args.checkpoint, args.layers, args.tokenizer) == ("tiny-llama", 2, "t.model")
    assert (args.task, args.data, args.samples, args.max_length) == ("alpaca", "d.json", 24, 300)
    assert finetune_llama.parse_args(base(checkpoint=None, preset="llama-2-7b").flags()).init == (
        "llama-2-7b"
    )


def test_the_first_step_counts_as_the_mean_of_the_others():
    steps = [{"tokens": 100, "tokens_per_s": rate} for rate in (1.0, 50.0, 25.0)]
    assert training_seconds(steps) == 9.0  # 3 x (2 + 4) / 2
    assert training_seconds(steps[:1]) == 100.0


@pytest.mark.parametrize("cell", [
    Cell(False, False, False, False), Cell(True, True, True, False), Cell(True, True, True, True),
    Cell(False, True, True, False, True),
], ids=lambda cell: cell.name)  # fmt: skip
def test_a_cell_is_predicted_as_the_model_it_trains(cell):
    given = base()
    precision = Precision("bf16" if cell.mixed else "fp32", torch.device("cpu"))
    model, tokenizer = given.load(torch.bfloat16 if cell.stored else torch.float32)
    options = MethodOptions(targets=FAMILY.targets, lora_dropout=0.0)
    model, _ = adapt(model, tokenizer, "lora" if cell.lora else "full", options)
    model.gradient_checkpointing = cell.checkpointing
    size, steps = (1, 8) if cell.accumulation else (8, 1)
    batch = Batches(given.rows, size, tokenizer.pad_id, 0, model.config.max_seq_len).largest()
    want = predict_footprint(model, batch, precision, steps).rows()
    found = given.predict(cell, 8, "bf16")
    assert found == pytest.approx({name: n / 2**20 for name, n in want.items()})


def test_a_cell_fits_where_more_is_free_than_it_needs_with_a_reserve():
    cell = Cell(True, False, True, False)
    needs = base().predict(cell, 8, "bf16")["total"]
    fits = {free: forecast(base(), cell, 8, "bf16", free)["fits"]
            for free in (0, int(needs) + 1, int(needs * 1.2) + 8192)}  # fmt: skip
    assert list(fits.values()) == [True, False, True]  # 0: how much is free is not known


@pytest.mark.parametrize("cell", [
    Cell(True, True, True, False), Cell(True, True, True, True, True)
], ids=lambda cell: cell.name)  # fmt: skip
def test_what_a_gpu_would_need_does_not_depend_on_this_cpu(cell, monkeypatch):
    found = []
    for emulated in (set(), {torch.bfloat16, torch.float16}):
        monkeypatch.setattr("minillm.linear._EMULATED", emulated)
        found.append(forecast(base(), cell, 8, "bf16", 40536)["predicted"])
    assert found[0] == found[1] and torch.backends.mkldnn.enabled


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
