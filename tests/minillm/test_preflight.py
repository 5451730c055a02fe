"""The checks before the first step: each finds its fault, and none leaves a trace."""

import math
import types

import pytest
import torch

from gpt2 import GPT2
from minillm import add_lora, mark_only_lora_as_trainable, precision, preflight
from minillm.data.batches import Batches, Row
from minillm.errors import NumericError, UserError
from minillm.footprint import predict_footprint
from minillm.losses import IGNORED, token_loss
from minillm.precision import Precision
from tests.conftest import MODELS, small_gpt2
from train import finetune_llama

FP32 = Precision("fp32", torch.device("cpu"))


def rows(n: int = 4) -> list[Row]:
    return [Row(t, t.clone()) for t in torch.randint(2048, (n, 20))]


def adapted():
    model = MODELS["llama-gqa"]()
    add_lora(model.train(), ("wq", "wv"), 4, 8, dropout=0.3)
    return mark_only_lora_as_trainable(model)


def dry(model, loss_fn=token_loss):
    return preflight.dry_step(model, loss_fn, Batches(rows(), 2, 0).largest(), FP32)


def test_a_dry_step_leaves_no_gradient_and_no_draw_behind():
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fed = Batches(rows(), 2, 0).largest()
    state = torch.get_rng_state()
    line = preflight.dry_step(model.eval(), token_loss, fed, FP32)
    assert "all 8 trained tensors" in line and not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_trained_tensor_without_a_gradient_is_found():
    model = adapted()
    model.stray = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match="no gradient reached stray"):
        dry(model)


def test_a_gradient_of_a_frozen_tensor_is_found():
    model = adapted()
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    with pytest.raises(RuntimeError, match="reached frozen norm.weight"):
        dry(model)


def test_weights_that_are_no_numbers_are_found_before_any_step():
    model = adapted()
    model.norm.weight.data[0] = math.nan
    with pytest.raises(NumericError, match="before any step"):
        dry(model)


def test_too_little_memory_is_said_with_both_numbers(monkeypatch):
    monkeypatch.setattr(preflight, "free_mib", lambda device: 0.01)
    found = predict_footprint(adapted(), Batches(rows(), 2, 0).largest(), FP32, 2)
    with pytest.raises(UserError, match=r"needs .* MiB beside the weights, 0 are free; lower"):
        preflight.check_memory(found, FP32.device)


def test_too_little_disk_is_said_with_both_numbers(monkeypatch, tmp_path):
    import types

    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=5))
    with pytest.raises(UserError, match=r"no space for checkpoints \(need .* free 0.0\)"):
        preflight.check_disk(adapted(), tmp_path / "not" / "yet")


def test_samples_beyond_the_context_are_found():
    with pytest.raises(UserError, match="lower --max-length"):
        preflight.check_context(rows(), rows(), 10)


def test_a_missing_end_of_text_is_said():
    assert "will not learn to stop" in preflight.check_labels(rows(), eos_id=5000)
    ended = [Row(torch.tensor([1, 2, 3]), torch.tensor([-100, 2, 3]))]
    assert preflight.check_labels(ended, eos_id=3) == (
        "66.7% of the tokens supervised; 1 of 1 samples end with the end-of-text token"
    )


@pytest.mark.parametrize(("arch", "capability", "runs"), [
    ("sm_80", (8, 6), True), ("sm_86", (8, 0), False), ("sm_90", (8, 6), False),
    ("compute_80", (9, 0), True), ("sm_90a", (9, 0), True), ("compute_90", (8, 6), False),
    ("sm_120", (12, 0), True),
])  # fmt: skip
def test_which_gpu_code_runs_where(arch, capability, runs):
    assert precision._runs(arch, *capability) is runs


def test_a_dry_run_checks_and_leaves_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    flags = ["--layers", "1", "--samples", "8", "--held-out", "4", "--dry-run"]
    assert finetune_llama.main([*flags, "--out-dir", str(folder)]) is None
    printed = capsys.readouterr().out
    assert "dry step" in printed and "before:" not in printed and not folder.exists()


def test_held_out_rows_that_are_trained_on_are_counted():
    some = rows(6)
    assert preflight.check_held_out(some[:4], some[4:]).startswith("no held-out sample")
    assert preflight.check_held_out(some[:4], some[2:]).startswith("2 of 4 held-out samples")


def test_held_out_prompts_that_are_trained_with_another_answer_are_counted():
    def row(prompt: int, answer: int) -> Row:
        tokens = torch.tensor([1, prompt, answer])
        return Row(tokens, tokens.where(torch.arange(3) > 1, IGNORED))

    trained, held_out = [row(5, 7), row(6, 7)], [row(5, 8), row(6, 7), row(9, 7), row(9, 8)]
    found = preflight.check_held_out(trained, held_out).split("; ")
    assert found[0].startswith("1 of 4 held-out samples")
    assert found[1].startswith("1 of 4 held-out samples have a prompt that is trained on")


def test_held_out_pairs_are_counted_as_pairs():
    def pair(prompt: int, chosen: int) -> list[Row]:
        both = [torch.tensor([1, prompt, answer]) for answer in (chosen, 9)]
        return [Row(t, t.where(torch.arange(3) > 1, IGNORED)) for t in both]

    trained = [*pair(5, 2), *pair(6, 2)]
    held_out = [*pair(5, 3), *pair(6, 3), *pair(6, 2), *pair(7, 2)]
    found = preflight.check_held_out(trained, held_out, 2).split("; ")
    assert [line.split(" held-out")[0] for line in found] == ["1 of 4", "2 of 4"]


def test_texts_after_nothing_but_bos_share_no_prompt():
    some = rows(4)
    for row in some:
        row.tokens[0], row.labels[0] = 1, IGNORED
    assert preflight.check_held_out(some[:2], some[2:]).startswith("no held-out sample")


def test_the_disk_must_hold_four_checkpoints_of_three_times_what_is_trained(monkeypatch, tmp_path):
    model = GPT2(small_gpt2())
    need = 4 * 3 * sum(p.nbytes for p in model.parameters())
    for free, enough in ((need, True), (need - 1, False)):
        monkeypatch.setattr(preflight.shutil, "disk_usage",
                            lambda path, free=free: types.SimpleNamespace(free=free))  # fmt: skip
        if enough:
            preflight.check_disk(model, tmp_path)
        else:
            with pytest.raises(UserError, match="no space for checkpoints"):
                preflight.check_disk(model, tmp_path)


@pytest.mark.parametrize("side", [0, 1])
def test_a_sample_beyond_the_context_is_found_on_either_side(side):
    short, long = ([Row(torch.arange(n), torch.arange(n))] for n in (11, 12))
    preflight.check_context(short, short, 10)
    with pytest.raises(UserError, match="12 tokens does not fit"):
        preflight.check_context(*([long, short] if side == 0 else [short, long]), 10)


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_a_cpu_is_one_device_however_it_is_numbered(name):
    assert precision.choose_device(name) == torch.device("cpu")
