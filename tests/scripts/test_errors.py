"""What a user can get wrong: one line on stderr, `error: WHERE: what; what to do`, exit code 2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama import Llama, LlamaTokenizer, save_llama
from minillm.errors import NumericError, UserError, friendly_errors
from tests.conftest import ROOT, TINY_LLAMA, shared, small_config
from tools import generate
from train import finetune_llama, pretrain


def fails(capsys, main, *argv) -> str:
    """Runs a script's main under the error contract; the one line it prints."""
    with pytest.raises(SystemExit) as stop, friendly_errors():
        main([str(word) for word in argv])
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(err) == 1, err
    assert "; " in err[0], "no remedy"
    return err[0]


@pytest.fixture
def broken(tmp_path) -> Path:
    """A copy of the tiny model to break."""
    shutil.copytree(TINY_LLAMA, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning-rate", "1"], "--lerning-rate: unknown"),
        (["--learing_rate", "1"], "unknown"),
        (["--ranks", "1"], "did you mean --rank?"),
        (["--rank", "many"], "--rank"),
        (["--epochs", "0"], "--epochs"),
        (["--precision", "fp8"], "fp8"),
        (["--task", "chess"], "chess"),
        (["--device", "abacus"], "abacus"),
        (["--layers", "7"], "6 layers, not 7"),
        (["--layers", "0"], "--layers"),
        (["--init", "llama-3"], "llama-2-7b"),
        (["--init", "llama-2-7b", "--layers", "1"], "--tokenizer"),
        (["--init", "llama-2-7b", "--layers", "33"], "32 layers"),
        (["--checkpoint", "no/such/folder"], "no/such/folder"),
        (["--targets", "wx"], "wx"),
        (["--alpha", "0"], "--alpha 0"),
        (["--precision", "fp16", "--frozen-dtype", "bf16"], "two 16-bit"),
        (["--rank", "500"], "rank 500"),
        (["--template", "vicuna"], "vicuna"),
        (["--data", "no/such.json"], "no/such.json"),
        (["--config", "no/such.json"], "no/such.json"),
        (["--resume"], "no run to resume"),
        (["--max-length", "3"], "--max-length 3"),
        (["stray"], "stray"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--lora-dropout", "1"], "--lora-dropout"),
        (["--grad-clip", "-1"], "--grad-clip"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--device", "meta"], "meta"),
        (["--init", "llama-2-7b", "--checkpoint", "x"], "contradict"),
        (["--resume", "--overwrite"], "contradict"),
    ],
)
def test_a_wrong_flag_or_value(capsys, tmp_path, argv, message):
    base = ["--samples", "8", "--out-dir", tmp_path / "run"]
    assert message in fails(capsys, finetune_llama.main, *base, *argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "empty"), ("[]", "no samples"), ('{"instruction": "a"\n', ":1: broken JSON"),
     ('[{"instruction": "a", "output": "b"},\n\n{]', ":3: broken JSON"),
     ("PAR1", "a Parquet file"), ("\x1f\x8b", "a gzip file")],
)  # fmt: skip
def test_bad_data(capsys, tmp_path, content, message):
    (tmp_path / "train.json").write_text(content, "latin-1")
    line = fails(capsys, finetune_llama.main, "--data", tmp_path / "train.json")
    assert f"{tmp_path}/train.json" in line and message in line


def test_a_folder_in_place_of_a_file(capsys, tmp_path):
    assert "a folder; name the file" in fails(capsys, finetune_llama.main, "--data", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no weights"), (b"", "empty"), (b"<html>", "HTML"), (b"\0" * 99, "corrupt"),
     (b"version https://git-lfs.github.com/spec/v1", "Git-LFS")],
)  # fmt: skip
def test_bad_weights(capsys, broken, content, message):
    (broken / "model.safetensors").unlink()
    if content is not None:
        (broken / "model.safetensors").write_bytes(content)
    line = fails(capsys, generate.main, "--checkpoint", broken, "--prompt", "x")
    assert message in line and str(broken) in line


def test_a_tokenizer_of_another_model(capsys, broken):
    shutil.copy(shared("llama2_tokenizer.model"), broken / "tokenizer.model")
    line = fails(capsys, generate.main, "--checkpoint", broken, "--prompt", "x")
    assert "32000" in line and "2048" in line


@pytest.mark.parametrize("cache", ["--cache", "--no-cache"])
def test_a_prompt_longer_than_the_context(capsys, cache):
    line = fails(capsys, generate.main, "--prompt", "word " * 3000, cache)
    assert "512" in line


@pytest.mark.parametrize("argv", [["--prompt", "x", "--top-p", "2"], [], ["--prompts", "none.txt"]])
def test_bad_generation_requests(capsys, argv):
    fails(capsys, generate.main, *argv)


def test_a_setting_of_the_wrong_kind_in_a_config_file(capsys, tmp_path):
    contents = ['{"rank": "many"}', '{"ranks": 3}', "[1]", "{", "", '{"method": "magic"}',
                '{"epochs": null}', '{"lr": true}', '{"samples": 4.9}', '{"resume": "yes"}',
                '{"targets": ["wq"]}']  # fmt: skip
    for content in contents:
        (tmp_path / "c.json").write_text(content)
        assert "c.json" in fails(capsys, finetune_llama.main, "--config", tmp_path / "c.json")


def test_the_process_itself_ends_with_code_2_and_no_traceback():
    command = [sys.executable, ROOT / "tools" / "generate.py", "--prompt", "x", "--layers", "99"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("flags", "code"), [(["--init", "gpt2"], 141), (["--help"], 0)])
def test_a_reader_who_leaves_as_head_does_ends_it_without_a_word(flags, code, unbuffered):
    child = subprocess.Popen(
        [sys.executable, ROOT / "tools" / "lora_budget.py", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    child.stdout.close()
    assert child.communicate()[1] == b"" and child.returncode == code


def test_a_disk_that_is_full_when_python_ends_is_told_in_one_line():
    command = [sys.executable, ROOT / "tools" / "lora_budget.py", "--init", "gpt2"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONUNBUFFERED": ""})  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: No space left")


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("x: y; z"), 2), (NumericError("nan"), 3), (KeyboardInterrupt(), 130),
     (MemoryError(), 2), (RuntimeError("CUDA out of memory. Tried"), 2),
     (FileNotFoundError(2, "No such file", "x.txt"), 2)],
)  # fmt: skip
def test_exit_codes(capsys, error, code):
    with pytest.raises(SystemExit) as stop, friendly_errors():
        raise error
    assert stop.value.code == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_bug_of_ours_shows_its_traceback_and_asks_for_a_report(capsys):
    with pytest.raises(SystemExit) as stop, friendly_errors():
        raise RuntimeError("an invariant")
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "Traceback" in err and "report" in err


def test_a_config_file_gives_required_flags_and_repeated_ones_are_replaced(tmp_path):
    from tools import generate, sweep

    config = ["--config", str(tmp_path / "c.json")]
    (tmp_path / "s.json").write_text('{"out-dir": "x"}')
    assert sweep.parse_args(["--config", str(tmp_path / "s.json")]).out_dir == "x"
    (tmp_path / "c.json").write_text('{"prompt": ["a", "b"]}')
    assert generate.parse_args(config).prompt == ["a", "b"]
    assert generate.parse_args([*config, "--prompt", "c"]).prompt == ["c"]


def test_a_folder_of_another_kind_is_told_what_it_is(capsys, tmp_path):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    for name in ("metrics.jsonl", "config.json", "adapter/adapter_config.json"):
        (run / name).write_text("{}")
    ask = ["--prompt", "x"]
    for flags, message in (
        (["--adapter", tmp_path / "no"], "no such folder"),
        (["--adapter", tmp_path], "no adapter_config.json in it"),
        (["--adapter", run], f"give {run / 'adapter'}"),
        (["--adapter", TINY_LLAMA], "give it by --checkpoint"),
        (["--checkpoint", run], f"give --adapter {run / 'adapter'}"),
        (["--checkpoint", run / "adapter"], "give it by --adapter"),
    ):
        assert message in fails(capsys, generate.main, *ask, *flags)


def test_an_existing_run_is_refused_before_anything_is_loaded(capsys, tmp_path, monkeypatch):
    for name in ("metrics.jsonl", "config.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr("minillm.finetune.load", lambda *_: pytest.fail("loaded"))
    message = fails(capsys, finetune_llama.main, "--out-dir", tmp_path)
    assert "a run is there already" in message


def test_pretraining_replaces_no_model_unless_told(capsys, tmp_path):
    assert "--overwrite" in fails(capsys, pretrain.main, "--save", tmp_path)


def test_text_is_asked_of_no_model_with_fewer_ids_than_bytes(capsys, tmp_path):
    save_llama(Llama(small_config(vocab_size=128)), LlamaTokenizer(None), tmp_path)
    flags = ["--checkpoint", tmp_path]
    assert "--tokenizer" in fails(capsys, generate.main, *flags, "--prompt", "x")
    assert "--tokenizer" in fails(capsys, finetune_llama.main, *flags, "--out-dir", tmp_path / "r")
