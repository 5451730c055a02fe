"""train/finetune_llama.py as a user runs it, on the bundled tiny model."""

import json
import shutil

import pytest
import torch
from matplotlib.figure import Figure

from llama import LlamaTokenizer, load_llama
from minillm.errors import UserError
from minillm.peft_format import load_adapter, read_notes
from minillm.runs import read_metrics
from tests.conftest import TINY_LLAMA, shared
from tools import chat, evaluate, generate, merge_adapter
from train import finetune_llama

QUICK = ["--layers", "1", "--samples", "16", "--held-out", "8", "--accumulation-steps", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One quick LoRA run: its folder and what it printed."""
    import contextlib
    import io

    folder, printed = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        finetune_llama.main([*QUICK, "--lr", "0.01", "--epochs", "3", "--out_dir", str(folder)])
    return folder, printed.getvalue()


def test_a_run_that_came_to_its_end_is_not_said_to_have_lost_patience(run):
    assert "--patience" not in run[1]


def test_a_runs_picture_begins_before_training(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: drawn.extend(figure.axes))
    flags = [*QUICK, "--max-iters", "1", "--no-save", "--out-dir", str(tmp_path / "run")]
    before, _ = finetune_llama.main(flags)
    assert next(zip(*drawn[0].lines[1].get_data(), strict=True)) == (0, before)


def test_a_run_leaves_settings_metrics_picture_adapter_and_checkpoints(run):
    folder, _ = run
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "loss.png", "adapter", "best.pt"} <= names
    assert [n for n in names if n.startswith("step_")] == ["step_000012.pt"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["lr"] == 0.01


@pytest.fixture(scope="module")
def unsaved(tmp_path_factory):
    """The folder of two steps that kept no weights."""
    folder = tmp_path_factory.mktemp("runs") / "unsaved"
    finetune_llama.main([*QUICK, "--max-iters", "2", "--no-save", "--out-dir", str(folder)])
    return folder


def test_a_run_that_saves_nothing_leaves_no_weights(unsaved):
    names = {path.name for path in unsaved.iterdir()} - {".lock"}
    assert names == {"config.json", "loss.png", "metrics.jsonl", "summary.json"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_saves_nothing_trains_the_same(tmp_path, method):
    losses = {}
    for name, flags in {"kept": [], "measured": ["--no-save"]}.items():
        folder = tmp_path / name
        finetune_llama.main([*QUICK, "--method", method, "--out-dir", str(folder), *flags])
        losses[name] = [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]
    assert losses["measured"] == losses["kept"]


@pytest.mark.parametrize(("lr", "is_worse"), [("1e-4", False), ("10", True)])
def test_a_run_that_made_it_worse_says_so(lr, is_worse, tmp_path, capsys):
    flags = ["--lr", lr, "--max-iters", "1", "--no-save", "--out-dir", str(tmp_path / "run")]
    finetune_llama.main([*QUICK, *flags])
    told = "higher than before training; lower --lr" in capsys.readouterr().err
    assert told is is_worse


def test_a_complete_run_without_checkpoints_is_not_resumed(unsaved):
    """It would begin again and lose its log."""
    log = (unsaved / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="--overwrite"):
        finetune_llama.main([*QUICK, "--out-dir", str(unsaved), "--resume"])
    assert (unsaved / "metrics.jsonl").read_text() == log


def test_a_run_stopped_before_its_first_checkpoint_begins_again(unsaved, tmp_path, capsys):
    shutil.copytree(unsaved, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been killed before its end
    finetune_llama.main([*QUICK, "--out-dir", str(tmp_path / "run"), "--resume"])
    assert "begins again" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_begun_before_there_was_no_save_goes_on_from_its_checkpoint(tmp_path):
    folder = tmp_path / "run"
    flags = [*QUICK, "--out-dir", str(folder)]
    finetune_llama.main([*flags, "--max-iters", "2"])
    settings = json.loads((folder / "config.json").read_text())
    del settings["no-save"]
    (folder / "config.json").write_text(json.dumps(settings))
    before = read_metrics(folder / "metrics.jsonl")
    finetune_llama.main([*flags, "--resume"])
    after = read_metrics(folder / "metrics.jsonl")
    assert after[:2] == before and [row["step"] for row in after] == [1, 2, 3, 4]


def test_keep_last_and_no_save_contradict_each_other():
    with pytest.raises(UserError, match="contradict"):
        finetune_llama.main([*QUICK, "--keep-last", "--no-save"])


def test_a_run_tells_what_it_did(run):
    _, printed = run
    for part in ("trainable, which is", "% of base + LoRA", "supervised", "before:", "after:",
                 "growth of the process", "optimizer state", "tokens/s", "1 layers"):  # fmt: skip
        assert part in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("held-out loss ")
    before, after = map(float, last.removeprefix("held-out loss ").split(" -> "))
    assert after < before


def test_every_step_has_its_line_of_metrics(run):
    rows = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert {"loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_s",
                "memory_mib"} <= row.keys()  # fmt: skip


def test_the_adapter_answers_by_its_own_template(run, capsys):
    adapter = str(run[0] / "adapter")
    asked = ["--adapter", adapter, "--prompt", "Where does Nora live?", "--max-new-tokens", "8"]
    cached = generate.main(asked)
    assert cached == generate.main([*asked, "--no-cache"])
    assert "decode" in capsys.readouterr().out
    assert cached != generate.main([*asked, "--template", "none"])


def test_the_adapter_fits_its_base_and_no_other(run):
    model, _ = load_llama(TINY_LLAMA, n_layers=1)
    load_adapter(model, run[0] / "adapter")
    assert read_notes(run[0] / "adapter")["template"]["name"] == "alpaca"
    with pytest.raises(UserError, match="another base"):
        load_adapter(load_llama(TINY_LLAMA)[0], run[0] / "adapter")


def test_a_merged_adapter_is_a_model_that_answers_the_same(run, tmp_path):
    adapter, merged = str(run[0] / "adapter"), str(tmp_path / "merged")
    merge_adapter.main(["--adapter", adapter, "--out", merged])
    ask = ["--prompt", "Where does Nora live?", "--max-new-tokens", "12", "--template", "alpaca"]
    want = generate.main([*ask, "--adapter", adapter])
    assert generate.main([*ask, "--checkpoint", merged]) == want
    with pytest.raises(UserError, match="another base"):  # it would count twice
        generate.main([*ask, "--checkpoint", merged, "--adapter", adapter])
    peft = tmp_path / "peft"  # as PEFT writes it, which does not know its base
    shutil.copytree(adapter, peft, ignore=shutil.ignore_patterns("minillm.json"))
    with pytest.raises(UserError, match="merged into it"):
        generate.main([*ask, "--checkpoint", merged, "--adapter", str(peft)])


def test_an_adapter_is_refused_with_another_tokenizer(run, tmp_path):
    adapter, other = str(run[0] / "adapter"), str(tmp_path / "tokenizer.model")
    words = [f"{n * 7919:b}".translate({48: "o", 49: "n"}) for n in range(4000)]
    LlamaTokenizer.train(words, 2048).save(tmp_path)
    ask = ["--prompt", "Where?", "--max-new-tokens", "1", "--adapter", adapter]
    with pytest.raises(UserError, match="another tokenizer"):
        generate.main([*ask, "--tokenizer", other])
    generate.main([*ask, "--tokenizer", str(TINY_LLAMA / "tokenizer.model")])


def test_an_adapter_remembers_the_settings_of_its_training(run):
    kept = json.loads((run[0] / "config.json").read_text())
    assert read_notes(run[0] / "adapter")["settings"] == kept and "seed" in kept


def test_a_resumed_run_continues_and_a_finished_one_is_complete(run, tmp_path):
    flags = [*QUICK, "--lr", "0.01", "--epochs", "3", "--eval-every", "2"]
    part, whole = tmp_path / "part", tmp_path / "whole"
    finetune_llama.main([*flags, "--out-dir", str(part), "--max-iters", "4"])
    resumed = finetune_llama.main([*flags, "--out-dir", str(part), "--resume"])
    assert resumed == finetune_llama.main([*flags, "--out-dir", str(whole)])
    assert resumed == finetune_llama.main([*flags, "--out-dir", str(part), "--resume"])


def test_full_fine_tuning_writes_a_model_transformers_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = str(tmp_path / "run")
    finetune_llama.main([*QUICK, "--method", "full", "--lr", "1e-3", "--out-dir", folder])
    model, _ = load_llama(tmp_path / "run" / "model")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokens = torch.randint(0, 2048, (1, 40))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "flags",
    [["--attention", "sdpa", "--gradient-checkpointing"], ["--pack", "200"],
     *(pytest.param(flags, marks=pytest.mark.slow) for flags in (
         ["--precision", "fp32"], ["--precision", "fp16"], ["--gradient-checkpointing"],
         ["--frozen-dtype", "bf16", "--precision", "fp32"],
     ))],
)  # fmt: skip
def test_every_way_to_compute_trains_to_about_the_same_loss(run, tmp_path, flags):
    folder = str(tmp_path / "run")
    common = [*QUICK, "--lr", "0.003", "--epochs", "3", "--lora-dropout", "0"]
    _, want = finetune_llama.main([*common, "--out-dir", str(tmp_path / "plain")])
    _, got = finetune_llama.main([*common, *flags, "--out-dir", folder])
    assert got == pytest.approx(want, rel=0.02)


def test_a_config_file_sets_flags_and_the_command_line_wins(tmp_path):
    (tmp_path / "c.json").write_text('{"lr": 0.5, "rank": 2, "lora_dropout": 0.3}')
    args = finetune_llama.parse_args(["--config", str(tmp_path / "c.json"), "--lr=0.25"])
    assert (args.lr, args.rank, args.lora_dropout) == (0.25, 2, 0.3)
    assert finetune_llama.parse_args(["--lora_dropout", "0.1"]).lora_dropout == 0.1


def test_a_runs_own_config_repeats_it_and_resumes_it(run, tmp_path):
    settings = ["--config", str(run[0] / "config.json")]
    settings += ["--out-dir", str(tmp_path / "again")]
    again = finetune_llama.main(settings)
    first = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    assert again[1] == min(row["held_out_loss"] for row in first if "held_out_loss" in row)
    assert finetune_llama.main([*settings, "--resume"]) == again


def test_a_switch_of_a_config_file_may_be_spelt_in_the_negative(tmp_path):
    (tmp_path / "c.json").write_text('{"no-cache": true, "prompt": ["a", "b"]}')
    args = generate.parse_args(["--config", str(tmp_path / "c.json")])
    assert args.cache is False and args.prompt == ["a", "b"]


@pytest.mark.parametrize(("flags", "steps", "warning"), [
    (["--epochs", "3"], 12, ""), (["--epochs", "3", "--max-iters", "5"], 5, ""),
    (["--max-iters", "9"], 4, "--max-iters 9: --epochs 1 ends the run at step 4; raise it"),
    (["--warmup", "4"], 4, "--warmup 4: all 4 steps of the run are warm-up; lower it"),
    (["--warmup", "3"], 4, ""), (["--warmup", "1", "--max-iters", "1"], 1, ""),
    (["--patience", "1"], 4, "--patience 1: evaluated every 4 steps, a run of 4 has no more"),
    (["--patience", "2", "--eval-every", "2"], 4, "--patience 2: evaluated every 2 steps, a run"),
    (["--patience", "1", "--eval-every", "3"], 4, ""),
    (["--override"], 4, "--override: no effect without --resume"),
])  # fmt: skip
def test_the_length_of_a_run_is_told_and_what_does_not_fit_into_it(flags, steps, warning, capsys):
    finetune_llama.main([*QUICK, *flags, "--dry-run"])
    out, err = capsys.readouterr()
    assert "step: 4 samples in 4 forwards of 1, " in out
    assert f"; 4 steps an epoch, {steps} in all\n" in out
    told = [line.removeprefix("warning: ") for line in err.splitlines() if "warning" in line]
    assert len(told) == bool(warning) and all(line.startswith(warning) for line in told)


@pytest.mark.parametrize(("flags", "cut"), [
    (["--pack", "300"], "16 samples in forwards of up to 300 tokens, "),
    (["--batch-size", "4"], "16 samples in 4 forwards of 4, "),
    (["--batch-size", "4", "--accumulation-steps", "1"], "4 samples in a forward of 4, "),
    (["--samples", "3"], "3 samples in a forward of 3, "),
])  # fmt: skip
def test_a_step_is_told_by_what_is_in_it(flags, cut, capsys):
    finetune_llama.main([*QUICK, "--batch-size", "4", *flags, "--dry-run"])
    assert f"step: {cut}" in capsys.readouterr().out


def test_full_fine_tuning_that_cannot_fit_is_refused_before_a_weight_is_read(monkeypatch):
    """The weights alone would fit."""
    n_bytes = 4 * sum(p.numel() for p in load_llama(TINY_LLAMA, n_layers=1)[0].parameters())
    monkeypatch.setattr("minillm.memory.free_mib", lambda device: 2 * n_bytes / 2**20)
    finetune_llama.main([*QUICK, "--dry-run"])
    with pytest.raises(UserError, match="AdamW's two moments in fp32: out of memory: needs 12 MiB"):
        finetune_llama.main([*QUICK, "--method", "full", "--dry-run"])


def test_a_dry_run_tells_whether_the_run_could_be_resumed(run, tmp_path, capsys):
    again = [*QUICK, "--lr", "0.01", "--epochs", "3", "--out-dir", str(run[0]), "--resume"]
    finetune_llama.main([*again, "--dry-run"])
    with pytest.raises(UserError, match="began with --lr 0.01, not 0.02"):
        finetune_llama.main([*again, "--lr", "0.02", "--dry-run"])
    finetune_llama.main([*again, "--lr", "0.02", "--dry-run", "--override"])
    assert "of this epoch's samples" not in capsys.readouterr().err
    finetune_llama.main([*again, "--batch-size", "2", "--dry-run", "--override"])
    assert "of this epoch's samples some will be met twice or not" in capsys.readouterr().err
    with pytest.raises(UserError, match="no run to resume"):
        finetune_llama.parse_args([*again, "--out-dir", str(tmp_path), "--dry-run"])


def test_a_run_that_patience_ended_says_so(tmp_path, capsys):
    flags = [*QUICK, "--lr", "0", "--epochs", "5", "--patience", "2", "--no-save"]
    finetune_llama.main([*flags, "--out-dir", str(tmp_path / "run")])
    told = "ended by --patience: 2 evaluations without a new best; all would have been 20 steps\n"
    assert told in capsys.readouterr().out


def test_defaults_are_the_courses():
    args = finetune_llama.parse_args([])
    assert (args.lr, args.batch_size, args.accumulation_steps) == (1e-5, 1, 8)
    assert (args.rank, args.alpha, args.lora_dropout, args.targets) == (16, 32, 0.05, "wq,wv")
    assert (args.samples, args.epochs) == (200, 1)


def test_chat_streams_answers_until_the_end_of_input(run, monkeypatch, capsys):
    lines = iter(["Where does Nora live?", "", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.main(["--adapter", str(run[0] / "adapter"), "--max-new-tokens", "5"])
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.slow
def test_one_decoder_layer_of_7b_size_learns_from_the_real_alpaca(tmp_path):
    before, after = finetune_llama.main([
        "--init", "llama-2-7b", "--layers", "1", "--samples", "16", "--held-out", "8",
        "--tokenizer", str(shared("llama2_tokenizer.model")), "--lr", "1e-3",
        "--data", str(shared("alpaca_200.json")), "--out-dir", str(tmp_path / "run"),
    ])  # fmt: skip
    assert after < before


def test_the_adapter_is_measured_on_what_the_bundled_task_holds_out(run, tmp_path):
    """It has no test split."""
    adapter = ["--adapter", str(run[0] / "adapter"), "--task", "alpaca"]
    reports = evaluate.main([*adapter, "--samples", "4", "--max-new-tokens", "4",
                             "--out-dir", str(tmp_path)])  # fmt: skip
    kept = json.loads((tmp_path / "evaluation-validation" / "text" / "results.json").read_text())
    assert reports["text"]["n"] == 4 and kept["settings"]["template"]["name"] == "alpaca"
