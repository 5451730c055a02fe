"""A run's folder: who may take it, what survives in it, and what a resumed run may change."""

import pytest
import torch

from llama import Llama
from minillm.data.batches import Batches
from minillm.errors import UserError
from minillm.losses import token_loss
from minillm.precision import choose_precision
from minillm.runs import Run, check_folder, fresh_folder
from minillm.training import TrainSettings, train
from tests.conftest import FP32, lora_model, ragged_rows, small_config


def test_an_existing_run_wants_resume_or_overwrite(tmp_path):
    Run(tmp_path / "run", {"lr": 1})
    with pytest.raises(UserError, match="--resume"):
        Run(tmp_path / "run", {"lr": 1})
    with pytest.raises(UserError, match="--lr"):
        Run(tmp_path / "run", {"lr": 2}, resume=True)
    Run(tmp_path / "run", {"lr": 1}, resume=True)
    Run(tmp_path / "run", {"lr": 2}, overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="something else"):
        Run(tmp_path / "thesis", {}, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_overwrite_never_removes_a_models_folder(tmp_path, tokenizer):
    """A model's folder has a config.json as well: it was once taken for a run and removed."""
    from llama import save_llama

    save_llama(Llama(small_config()), tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="something else"):
        Run(tmp_path / "model", {}, overwrite=True)
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_resume_and_overwrite_together_remove_nothing(tmp_path):
    Run(tmp_path / "run", {}).log({"step": 1})
    with pytest.raises(UserError, match="contradict"):
        Run(tmp_path / "run", {}, resume=True, overwrite=True)
    assert Run(tmp_path / "run", {}, resume=True).rows() == [{"step": 1}]


def test_runs_without_a_name_that_begin_together_get_folders_of_their_own(tmp_path):
    folders = [fresh_folder(tmp_path, "run") for _ in range(3)]
    assert [folder.name for folder in folders] == ["run-001", "run-002", "run-003"]
    Run(folders[0], {})  # a folder so made is taken as it is


def test_one_process_holds_a_folder_until_its_last_run_of_it_ends(tmp_path):
    import gc

    from minillm.files import _HELD

    first = Run(tmp_path / "run", {})
    second = Run(tmp_path / "run", {}, resume=True)
    del first
    gc.collect()
    assert (tmp_path / "run").resolve() in _HELD
    del second
    gc.collect()
    assert (tmp_path / "run").resolve() not in _HELD


def test_a_run_killed_before_its_first_checkpoint_begins_again_without_doubled_lines(tmp_path):
    run = Run(tmp_path / "run", {})
    run.log({"step": 1})
    assert run.load_newest() is None and run.rows() == []


def test_a_log_that_ends_in_broken_bytes_is_read_up_to_them(tmp_path):
    run = Run(tmp_path / "run", {})
    run.log({"step": 1})
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 2, "lo\xff\xfe')
    assert run.rows() == [{"step": 1}]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    settings = TrainSettings(lr=0.01, epochs=4, accumulation_steps=1, eval_every=1)
    run = Run(tmp_path / "run", {})
    train(lora_model(), token_loss, Batches(ragged_rows(2), 2, 0), None, settings, FP32, run)
    newest, before = sorted((tmp_path / "run").glob("step_*.pt"), reverse=True)
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    assert run.load_newest()["step"] == 3 and "damaged" in capsys.readouterr().err
    before.write_bytes(b"")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        run.load_newest()


def test_a_checkpoint_of_something_else_is_named(tmp_path):
    run = Run(tmp_path / "run", {})
    run.save({"step": 1}, 1)
    batches = Batches(ragged_rows(2), 1, 0)
    with pytest.raises(UserError, match=r"step_000001\.pt: no checkpoint of a run"):
        train(lora_model(), token_loss, batches, None, TrainSettings(), FP32, run)


def test_the_best_weights_of_a_step_that_a_crash_undid_are_not_taken_for_another(tmp_path):
    run = Run(tmp_path / "run", {})
    run.save_best({"w": torch.ones(2)}, 2)
    assert torch.equal(run.load_best(2)["w"], torch.ones(2))
    with pytest.raises(UserError, match="is of step 2"):
        run.load_best(1)


def begin_and_resume(folder, changes, precision=FP32, first=FP32, **flags):
    """Two steps in `first`, then a third with other settings; the optimizer and the run."""
    batches = Batches(ragged_rows(6), 2, 0)
    for step, how, more in ((2, first, {}), (3, precision, changes)):
        settings = TrainSettings(lr=0.01, accumulation_steps=1, max_iters=step, **more)
        run = Run(folder, {}, resume=step == 3, made_with={"precision": how.name}, **flags)
        _, optimizer = train(lora_model(), token_loss, batches, None, settings, how, run)
    return optimizer, run


def test_a_resumed_run_decays_weights_as_it_is_now_told(tmp_path):
    optimizer, _ = begin_and_resume(tmp_path / "run", {"weight_decay": 0.5})
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert all(state["step"] == 3 for state in optimizer.state.values())


@pytest.mark.parametrize(("first", "then"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_a_run_goes_on_in_another_precision_and_says_so(tmp_path, capsys, first, then):
    first, then = (choose_precision(name, "cpu") for name in (first, then))
    _, run = begin_and_resume(tmp_path / "run", {}, then, first)
    assert len(run.rows()) == 3
    assert f"made with precision {first.name}, here it is {then.name}" in capsys.readouterr().err


def test_a_resume_that_is_refused_leaves_the_settings_as_they_were(tmp_path):
    begin_and_resume(tmp_path / "run", {}, identity={"data": "one"})
    run = Run(tmp_path / "run", {"data": "other.json"}, True, identity={"data": "other"},
              override=True)  # fmt: skip
    with pytest.raises(UserError, match="another data"):
        train(lora_model(), token_loss, Batches(ragged_rows(6), 2, 0), None, TrainSettings(), FP32,
              run)  # fmt: skip
    assert (tmp_path / "run" / "config.json").read_text().strip() == "{}"


def test_a_run_of_an_older_version_goes_on(tmp_path):
    begin_and_resume(tmp_path / "run", {}, identity={"model": "abc"})
    torch.save({"w": torch.ones(2)}, tmp_path / "run" / "best.pt")  # the weights alone
    now = {"model": {"bfloat16": "abc", "float16": "def"}}  # then one hash, now two
    run = Run(tmp_path / "run", {}, True, identity=now)
    assert run.load_newest()["step"] == 3 and torch.equal(run.load_best(3)["w"], torch.ones(2))
    with pytest.raises(UserError, match="another model"):
        Run(tmp_path / "run", {}, True, identity={"model": {"bfloat16": "x"}}).load_newest()


def test_a_damaged_checkpoint_is_no_longer_the_newest_after_a_fallback(tmp_path):
    run = Run(tmp_path / "run", {})
    for step in (1, 2):
        run.save({"step": step}, step)
    (tmp_path / "run" / "step_000002.pt").write_bytes(b"x")
    assert run.load_newest()["step"] == 1
    assert run.newest().name == "step_000001.pt"
    assert (tmp_path / "run" / "step_000002.pt.damaged").exists()


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    Run(tmp_path / "run", {})
    left = tmp_path / "run" / ".step_000001.pt.tmp.99"
    left.write_bytes(b"half")
    Run(tmp_path / "run", {}, resume=True)
    assert not left.exists()


def test_a_run_goes_on_where_the_weights_agree_in_one_of_two_dtypes(tmp_path):
    before = {"model": {"bfloat16": "a", "float16": "b"}}
    Run(tmp_path / "run", {}, identity=before).save({"step": 1}, 1)
    for now in ({"bfloat16": "a", "float16": "x"}, {"bfloat16": "x", "float16": "b"}):
        run = Run(tmp_path / "run", {}, True, identity={"model": now})
        assert run.load_newest()["step"] == 1


@pytest.mark.parametrize("name", ["file", "file/below", "link"])
def test_what_is_no_folder_is_refused_at_once(name, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a folder"):
        check_folder(tmp_path / name, resume=False, overwrite=True)
