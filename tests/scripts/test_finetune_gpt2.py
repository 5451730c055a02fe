"""train/finetune_gpt2.py, tools/evaluate.py and tools/sweep.py on the bundled tiny model."""

import contextlib
import io
import json
import shutil

import pytest
import torch

from gpt2 import load_gpt2
from minillm.errors import UserError
from minillm.runs import read_metrics
from tests.conftest import ROOT, TINY_GPT2, shared
from tests.scripts.test_errors import fails
from tools import evaluate, generate, merge_adapter, sweep
from train import finetune_gpt2

QUICK = ["--samples", "64", "--held-out", "16", "--batch-size", "8", "--accumulation-steps", "2",
         "--epochs", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One quick LoRA run: its folder and what it printed."""
    folder, printed = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        finetune_gpt2.main([*QUICK, "--lr", "0.003", "--keep-last", "--out_dir", str(folder)])
    return folder, printed.getvalue()


def test_a_run_tells_its_share_of_parameters_and_its_accuracy(run):
    folder, printed = run
    for part in ("% of the base's", "% of base + LoRA", "accuracy", "unparseable", "n = 16"):
        assert part in printed
    assert {"adapter", "adapter_last", "loss.png"} <= {path.name for path in folder.iterdir()}
    before, after = printed.strip().splitlines()[-1].removeprefix("held-out loss ").split(" -> ")
    assert float(after) < float(before)


def test_the_courses_flags_are_understood_in_both_spellings():
    args = finetune_gpt2.parse_args([
        "--init_from", "gpt2-medium", "--out_dir", "x", "--device", "cpu", "--lora_rank", "128",
        "--lora-alpha", "512", "--learning_rate", "2e-5", "--dropout", "0.05", "--lora_dropout",
        "0.05", "--max_iters", "80", "--wandb_project", "p",
    ])  # fmt: skip
    assert (args.checkpoint, args.rank, args.alpha, args.lr) == ("gpt2-medium", 128, 512, 2e-5)
    assert (args.max_iters, args.wandb_project, args.dropout) == (80, "p", 0.05)


@pytest.mark.slow
def test_rank_0_is_full_fine_tuning_and_writes_a_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "run"
    finetune_gpt2.main([*QUICK, "--rank", "0", "--dropout", "0.1", "--out-dir", str(folder)])
    model, _ = load_gpt2(folder / "model")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokens = torch.randint(0, 2048, (1, 40))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)
    again = ["--checkpoint", str(folder / "model"), "--samples", "8", "--by", "generation"]
    assert evaluate.main(again)["generation"]["n"] == 8  # asked in the template stored beside it


@pytest.mark.slow
def test_init_from_resume_continues_the_run_in_out_dir(tmp_path):
    part, whole = str(tmp_path / "part"), str(tmp_path / "whole")
    flags = [*QUICK, "--lr", "0.003", "--eval-every", "1"]
    finetune_gpt2.main([*flags, "--max-iters", "2", "--out-dir", part])
    began = json.loads((tmp_path / "part" / "config.json").read_text())
    resumed = finetune_gpt2.main(["--init_from", "resume", "--out_dir", part, "--max-iters", "4"])
    assert resumed == finetune_gpt2.main([*flags, "--max-iters", "4", "--out-dir", whole])
    assert json.loads((tmp_path / "part" / "config.json").read_text())["lr"] == began["lr"]


@pytest.mark.slow
def test_evaluation_is_deterministic_and_writes_the_courses_files(run):
    command = ["--adapter", str(run[0] / "adapter"), "--samples", "40", "--batch-size", "7"]
    reports = evaluate.main(command)
    assert evaluate.main([*command[:-1], "40"]) == reports
    for by in ("generation", "likelihood"):
        folder = run[0] / "adapter" / "evaluation-test" / by
        results = json.loads((folder / "results.json").read_text())
        assert {"pos_counter", "neg_counter", "accuracy", "counter"} <= results.keys()
        rows = json.loads((folder / "predictions.json").read_text())
        right = sum(row["true label"] == row["predicted label"] for row in rows)
        assert len(rows) == 40 and results["counter"] == right
        assert results["accuracy"] == right / 40 == reports[by]["accuracy"]


def test_tools_find_a_gpt2_adapters_base_and_merge_it(run, tmp_path):
    adapter, merged = str(run[0] / "adapter"), str(tmp_path / "merged")
    merge_adapter.main(["--adapter", adapter, "--out", merged])
    ask = ["--prompt", "A dull film.", "--max-new-tokens", "6"]
    want = generate.main([*ask, "--adapter", adapter])
    assert generate.main([*ask, "--checkpoint", merged]) == want
    assert want == generate.main([*ask, "--adapter", adapter, "--no-cache"])


@pytest.mark.parametrize(
    "targets",
    ["q,v", *(pytest.param(names, marks=pytest.mark.slow)
              for names in ("c_attn,c_proj", "attn.c_proj,c_fc"))],
)  # fmt: skip
def test_every_kind_of_target_trains(tmp_path, targets):
    flags = [*QUICK, "--max-iters", "2", "--targets", targets, "--out-dir", str(tmp_path / "run")]
    before, after = finetune_gpt2.main([*flags, "--lr", "0.003"])
    assert after < before
    reports = evaluate.main(["--adapter", str(tmp_path / "run" / "adapter"), "--samples", "4"])
    assert reports["likelihood"]["n"] == 4


@pytest.mark.slow
def test_without_wandb_a_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    flags = [*QUICK, "--max-iters", "1", "--wandb-project", "p", "--out-dir", str(tmp_path / "r")]
    finetune_gpt2.main(flags)
    assert "wandb is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_with_wandb_every_step_is_logged_there_too(tmp_path, monkeypatch):
    import types

    rows = []
    project = types.SimpleNamespace(log=lambda row, step: rows.append((step, row["loss"])))
    fake = types.SimpleNamespace(init=lambda **settings: project)
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    flags = [*QUICK, "--max-iters", "2", "--wandb-project", "p", "--out-dir", str(tmp_path / "r")]
    finetune_gpt2.main(flags)
    assert [step for step, _ in rows] == [1, 2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rank", "225"], "rank 225"),
        (["--targets", "wq"], "wq"),
        (["--targets", "q,c_attn"], "whole and in slices"),
        (["--init-from", "gpt2-medium"], "tools/download.py gpt2-medium"),
        (["--init-from", "resume"], "--out-dir"),
        (["--init-from", "resume", "--out-dir", "x", "--config",
          str(ROOT / "train" / "tiny_gpt2.json")], "leave --config out"),
        (["--method", "prompt_tuning", "--pack", "64"], "--pack"),
        (["--init", "gpt2"], "--tokenizer"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--dropout", "1"], "--dropout"),
        (["--template", "vicuna"], "vicuna"),
        (["--template", "alpaca"], "{text}"),
        (["--layers", "9"], "5 layers"),
    ],
)
def test_what_cannot_be_done_is_one_line(capsys, argv, message):
    assert message in fails(capsys, finetune_gpt2.main, "--samples", "8", *argv)


def test_resuming_with_another_model_is_refused(run, capsys):
    flags = [*QUICK, "--lr", "0.003", "--keep-last", "--out-dir", str(run[0]), "--resume"]
    line = fails(capsys, finetune_gpt2.main, *flags, "--layers", "2")
    assert "--layers" in line
    line = fails(capsys, finetune_gpt2.main, *flags, "--checkpoint", str(TINY_GPT2))
    assert "--checkpoint" in line


def test_a_split_that_a_task_does_not_have_is_refused(run, tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a", "label": 1}\n')
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(UserError, match="test.jsonl"):
        evaluate.main(["--adapter", str(run[0] / "adapter"), "--data", str(tmp_path)])


@pytest.mark.slow
def test_a_sweep_fills_its_tables_and_resumes_cell_by_cell(tmp_path):
    tiny = "--samples 16 --held-out 8 --batch-size 8 --accumulation-steps 1 --epochs 1"
    command = ["--out-dir", str(tmp_path / "s"), "--ranks", "2,4", "--test-samples", "12",
               "--train-flags", tiny]  # fmt: skip
    results = sweep.main(command)
    assert all({"best", "last"} <= result.keys() for result in list(results.values())[1:])
    folder = tmp_path / "s"
    assert {"report.md", "table.csv", "accuracy.png", "loss.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert len((folder / "table.csv").read_text().splitlines()) == 12
    assert {result["scale"] for result in list(results.values())[1:]} == {4.0, 16.0, None}
    for number, result in enumerate(results.values()):
        best = result["best"]
        assert best["report"]["accuracy"] == pytest.approx(sum(best["right"]) / 12)
        if number:
            steps = read_metrics(folder / f"cell-{number}" / "metrics.jsonl")
            held_out = [step["held_out_loss"] for step in steps if "held_out_loss" in step]
            summary = json.loads((folder / f"cell-{number}" / "summary.json").read_text())
            share = f"{100 * summary['trainable'] / summary['parameters']:.2f}% of all"
            assert result["best held-out loss"] == min(held_out) and share in result["trainable"]
            flag = "model" if result["scale"] is None else "adapter"
            is_other = (folder / f"cell-{number}" / f"{flag}_last" / "evaluation-test").exists()
            assert is_other == (held_out[-1] != min(held_out))
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("cell-*.json")}
    assert sweep.main(command) == results
    assert done == {path.name: path.stat().st_mtime_ns for path in folder.glob("cell-*.json")}


def test_a_sweep_has_the_rows_of_the_courses_tables():
    cells = sweep.plan(
        [16, 128, 196], [3e-3, 1e-3, 8e-4], ["reviews", "reviews-short"], ["--dropout", "0.05"]
    )
    assert [*cells] == [
        "LoRA r 16, alpha 64", "LoRA r 128, alpha 512", "LoRA r 196, alpha 784",
        "full fine-tuning", "LoRA r 16, alpha 256", "LoRA r 128, prompt reviews-short",
    ]  # fmt: skip
    assert cells["full fine-tuning"][:2] == ["--rank", "0"]
    assert cells["LoRA r 128, prompt reviews-short"][-2:] == ["--lr", "0.001"]


def test_a_sweep_of_one_alpha_gives_it_to_every_rank():
    cells = sweep.plan([8, 32], None, ["reviews"], [], alpha=16)
    assert [*cells] == ["LoRA r 8, alpha 16", "LoRA r 32, alpha 16", "full fine-tuning",
                        "LoRA r 8, alpha 64"]  # fmt: skip


def test_patience_counts_epochs_unless_told_otherwise():
    assert finetune_gpt2.parse_args([]).eval_every == 10
    assert finetune_gpt2.parse_args(["--patience", "2"]).eval_every is None
    assert finetune_gpt2.parse_args(["--patience", "2", "--eval-every", "5"]).eval_every == 5


@pytest.mark.parametrize("flags", [["--templates", "reviews,poem"], ["--ranks", "8,x"],
                                   ["--lrs", "1e-3,1e-4"],
                                   ["--ranks", "2,99999"], ["--train-flags", "--targets nope"],
                                   ["--train-flags", "--lora_alpha=8"],
                                   ["--train-flags", "--data_path=reviews"],
                                   ["--train-flags", "--layers 1"],
                                   ["--full-flags", "--init-from gpt2"],
                                   ["--full-flags", "--template reviews"]])  # fmt: skip
def test_a_sweep_refuses_what_it_cannot_do_before_its_first_cell(flags, tmp_path):
    with pytest.raises(UserError):
        sweep.main(["--out-dir", str(tmp_path / "s"), *flags])
    assert not (tmp_path / "s").exists()


def test_a_sweep_with_other_settings_wants_another_folder(tmp_path):
    (tmp_path / "experiment.json").write_text("{}")
    with pytest.raises(UserError, match="--out-dir"):
        sweep.main(["--out-dir", str(tmp_path)])


@pytest.mark.slow
def test_gpt2_of_official_size_learns_from_the_real_reviews(tmp_path):
    before, after = finetune_gpt2.main([
        "--init", "gpt2", "--tokenizer", str(shared("gpt2_vocab")), "--samples", "64",
        "--held-out", "8", "--data", str(shared("rt-polarity.pos").parent), "--lr", "1e-3",
        "--accumulation-steps", "4", "--epochs", "1", "--out-dir", str(tmp_path / "run"),
    ])  # fmt: skip
    assert after < before


def test_evaluating_a_run_by_its_folder_is_evaluating_what_it_kept(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    few = ["--samples", "20", "--by", "generation"]
    want = evaluate.main(["--adapter", str(run[0] / "adapter"), *few, "--out-dir", str(tmp_path)])
    resume = ["--init_from", "resume", "--out_dir", str(tmp_path / "run")]
    assert evaluate.main([*resume, *few]) == want
    assert (tmp_path / "run" / "evaluation-test" / "generation" / "results.json").exists()


def test_a_run_that_keeps_its_last_step_answers_with_it_too(run):
    lines = [line.split(":")[0].strip() for line in run[1].splitlines()]
    assert [word for word in lines if word in ("before", "last", "after")] == [
        "before", "last", "after"]  # fmt: skip


def test_evaluate_takes_task_and_data_from_the_training_and_says_so(bpe, tmp_path, capsys):
    rows = [{"prompt": f"{i} and", "completion": f" {i + 1}"} for i in range(80)]
    data, folder = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--task", "completion", "--data", str(data), "--template", "prompt"]
    finetune_gpt2.main([*QUICK, *flags, "--max-iters", "1", "--out-dir", str(folder)])
    for kept in (["--adapter", str(folder / "adapter")],
                 ["--init-from", "resume", "--out-dir", str(folder)]):  # fmt: skip
        report = evaluate.main([*kept, "--samples", "3", "--max-new-tokens", "4"])
        assert report["text"]["n"] == 3
        assert f"completion, {data}: 3 samples of test" in capsys.readouterr().out
    evaluate.main([*kept, "--task", "completion", "--samples", "2", "--max-new-tokens", "1"])
    assert f"completion, {data}: 2 samples of test" in capsys.readouterr().out
    evaluate.main([*kept, "--task", "shakespeare", "--template", "complete", "--samples", "2",
                   "--max-new-tokens", "1"])  # fmt: skip
    assert "shakespeare, tinyworld: 2 samples of test" in capsys.readouterr().out
