"""The loop: accumulation, schedules, counting, and what it refuses to do silently."""

import itertools
import math
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from llama import Llama
from minillm.data.batches import Batches, Row
from minillm.errors import Interrupted, NumericError, UserError
from minillm.interrupt import deferred_signals
from minillm.losses import token_loss
from minillm.optimizer import lr_at, take_step
from minillm.precision import choose_precision
from minillm.progress import Progress, trainable_state
from minillm.runs import Run
from minillm.training import (
    TrainSettings,
    broken_step,
    check_step,
    evaluate,
    note_held_out,
    train,
)
from tests.conftest import FP32, lora_model, ragged_rows, sharp, small_config


def gradients_of_one_step(monkeypatch, batch_size: int, accumulation: int) -> list:
    """The gradients at the moment the optimizer steps, before clipping could hide a scale."""
    taken = []

    def spy(scaler, optimizer, progress):
        taken.extend(p.grad.clone() for g in optimizer.param_groups for p in g["params"])
        return take_step(scaler, optimizer, progress)

    monkeypatch.setattr("minillm.training.take_step", spy)
    batches = Batches(ragged_rows(8), batch_size, 0, seed=None)
    settings = TrainSettings(accumulation_steps=accumulation, grad_clip=0.0)
    model = sharp(Llama(small_config()))
    train(model, token_loss, batches, None, settings, FP32)
    return taken


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (3, 3)])
def test_accumulation_equals_one_big_batch_with_ragged_labels(
    monkeypatch, batch_size, accumulation
):
    torch.manual_seed(0)
    want = gradients_of_one_step(monkeypatch, 1, 8)
    torch.manual_seed(0)
    got = gradients_of_one_step(monkeypatch, batch_size, accumulation)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_the_last_partial_group_is_stepped_with_its_own_count(tmp_path):
    """10 samples, accumulation 4: three steps, the last from two samples, as made by hand. In
    float64: Adam magnifies rounding where a gradient is near zero."""
    rows = ragged_rows(10)
    settings = TrainSettings(lr=0.01, accumulation_steps=4)
    model = lora_model().double()
    train(model, token_loss, Batches(rows, 1, 0, seed=None), None, settings, FP32)

    twin = lora_model().double()
    params = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0.0)
    for group in (rows[:4], rows[4:8], rows[8:]):
        sums = [token_loss(twin, (r.tokens[None], r.labels[None])) for r in group]
        (sum(s for s, _ in sums) / sum(n for _, n in sums)).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for got, want in zip(trainable_state(model).values(), params, strict=True):
        torch.testing.assert_close(got, want.detach(), atol=1e-9, rtol=0)


def test_the_logged_loss_is_the_loss_per_supervised_token(tmp_path):
    rows = ragged_rows(8)
    run = Run(tmp_path / "run", {})
    train(lora_model(), token_loss, Batches(rows, 2, 0), None, TrainSettings(), FP32, run)
    model = lora_model()
    row = run.rows()[0]
    want = evaluate(model, token_loss, Batches(rows, 3, 0), FP32)
    assert row["loss"] == pytest.approx(want, abs=1e-5)
    assert row["supervised_tokens"] == sum(int((r.labels[1:] != -100).sum()) for r in rows)
    assert {"step", "lr", "grad_norm", "tokens", "tokens_per_s", "memory_mib"} <= row.keys()


def test_padding_changes_neither_loss_nor_count():
    model, (tokens, labels) = lora_model(), ragged_rows(1)[0]
    loss, count = token_loss(model, (tokens[None], labels[None]))
    padded = nn.functional.pad(tokens, (0, 9)), nn.functional.pad(labels, (0, 9), value=-100)
    more_loss, more_count = token_loss(model, tuple(t[None] for t in padded))
    torch.testing.assert_close(more_loss, loss)
    assert more_count == count


def test_a_batch_without_labels_has_loss_zero():
    tokens = torch.randint(0, 2048, (2, 9))
    loss, count = token_loss(lora_model(), (tokens, torch.full_like(tokens, -100)))
    assert loss == 0 and count == 0


def test_fp16_with_a_scaler_trains_on_cpu(tmp_path):
    run = Run(tmp_path / "run", {})
    settings = TrainSettings(lr=0.02, epochs=6)
    batches = Batches(ragged_rows(8), 2, 0)
    precision = choose_precision("fp16", "cpu")
    train(lora_model(), token_loss, batches, None, settings, precision, run)
    losses = [row["loss"] for row in run.rows()]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


def test_a_loss_that_is_no_number_stops_the_run():
    model = lora_model()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(NumericError, match="step 1"):
        train(model, token_loss, Batches(ragged_rows(2), 1, 0), None, TrainSettings(), FP32)


def test_a_model_in_eval_mode_trains_its_weights_and_not_their_merged_copies():
    model = lora_model().eval().requires_grad_(True)
    before = model.layers[0].attention.wq.train().weight.clone()
    train(model.eval(), token_loss, Batches(ragged_rows(2), 1, 0), None, TrainSettings(), FP32)
    assert not torch.equal(model.train().layers[0].attention.wq.weight, before)


def test_a_step_with_merged_layers_is_refused():
    """A merged forward gives A and B no gradient, and would train nothing, silently."""

    def merging_loss(model, batch):
        return token_loss(model.eval(), batch)

    batches = Batches(ragged_rows(2), 1, 0)
    with pytest.raises(RuntimeError):
        train(lora_model(), merging_loss, batches, None, TrainSettings(), FP32)
    with pytest.raises(RuntimeError, match="merged"):
        check_step(lora_model().eval(), Progress(step=1))


def test_a_trainable_tensor_without_gradient_is_refused():
    model = lora_model()
    model.register_parameter("stray", nn.Parameter(torch.ones(1)))
    with pytest.raises(RuntimeError, match="stray"):
        train(model, token_loss, Batches(ragged_rows(2), 1, 0), None, TrainSettings(), FP32)


def test_nothing_trainable_is_refused():
    model = Llama(small_config()).requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        train(model, token_loss, Batches(ragged_rows(2), 1, 0), None, TrainSettings(), FP32)


def test_evaluation_averages_over_tokens_and_restores_the_mode():
    rows, model = ragged_rows(7), lora_model(dropout=0.5)
    model.train()
    by_three, by_one = (evaluate(model, token_loss, Batches(rows, n, 0), FP32) for n in (3, 1))
    assert by_three == pytest.approx(by_one, abs=1e-5) and model.training


@pytest.mark.parametrize("eval_every", [1, None])  # None: after each epoch, here one step
def test_early_stopping_counts_evaluations_without_a_new_best(tmp_path, eval_every):
    """A learning rate of zero never improves: first evaluation is best, two more end the run."""
    settings = TrainSettings(
        lr=0.0, epochs=20, accumulation_steps=1, eval_every=eval_every, patience=2
    )
    rows = ragged_rows(4)
    run = Run(tmp_path / "run", {})
    batches, held_out = Batches(rows, 4, 0), Batches(rows, 4, 0, seed=None)
    progress, _ = train(lora_model(), token_loss, batches, held_out, settings, FP32, run)
    assert progress.step == 3 and progress.best_step == 1
    assert (tmp_path / "run" / "best.pt").exists()


@pytest.mark.parametrize("full", [False, True])
def test_a_resumed_run_is_bit_identical_to_one_never_stopped(tmp_path, full):
    def start(folder, max_iters, resume=False):
        model = lora_model(dropout=0.2)
        if full:
            model = sharp(Llama(small_config()))
        rows = ragged_rows(10)
        settings = TrainSettings(
            lr=0.01, epochs=3, accumulation_steps=2, eval_every=2, max_iters=max_iters
        )
        batches, held_out = Batches(rows, 2, 0), Batches(rows[:3], 2, 0, seed=None)
        run = Run(tmp_path / folder, {}, resume=resume)
        torch.manual_seed(5)
        train(model, token_loss, batches, held_out, settings, FP32, run)
        return [(r["step"], r["loss"], r["grad_norm"]) for r in run.rows()], trainable_state(model)

    want_rows, want = start("whole", None)
    start("parts", 4)
    got_rows, got = start("parts", None, resume=True)
    assert got_rows == want_rows and len(want_rows) == 9
    assert all(torch.equal(want[k], got[k]) for k in want)


def test_auto_precision_is_native_bf16_or_a_safe_choice(monkeypatch):
    import minillm.precision as precision

    monkeypatch.setattr(precision, "has_native_bf16", lambda device: False)
    assert choose_precision("auto", "cpu").name == "fp32"
    assert choose_precision("auto", "cuda").name == "fp16"
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: True)
    assert choose_precision("auto", "cpu").dtype == torch.bfloat16
    assert choose_precision("fp16", "cpu").scaler().is_enabled()
    assert not choose_precision("bf16", "cpu").scaler().is_enabled()


def test_a_resumed_run_out_of_patience_stays_stopped(tmp_path):
    settings = TrainSettings(lr=0.0, epochs=20, accumulation_steps=1, eval_every=1, patience=2)
    batches, held_out = Batches(ragged_rows(4), 4, 0), Batches(ragged_rows(4), 4, 0, seed=None)
    for resume in (False, True):
        run = Run(tmp_path / "run", {}, resume)
        train(lora_model(), token_loss, batches, held_out, settings, FP32, run)
        assert [row["step"] for row in run.rows()] == [1, 2, 3]


def test_a_run_stopped_before_its_first_evaluation_and_ended_there_is_evaluated(tmp_path):
    settings = TrainSettings(lr=0.01, accumulation_steps=1, max_iters=2, save_every=0)
    batches, held_out = Batches(ragged_rows(4), 1, 0), Batches(ragged_rows(4), 4, 0, seed=None)
    train(lora_model(), token_loss, batches, None, settings, FP32, Run(tmp_path / "run", {}))
    model, run = lora_model(), Run(tmp_path / "run", {}, resume=True)
    progress, _ = train(model, token_loss, batches, held_out, settings, FP32, run)
    assert (progress.step, progress.best_step) == (2, 2)
    assert progress.best == evaluate(model, token_loss, held_out, FP32)
    assert run.load_best(2).keys() == trainable_state(model).keys()
    kept = run.load_newest()  # as if the run had ended there
    assert (kept["best"], kept["best_step"]) == (progress.best, 2)
    assert [row["step"] for row in run.rows()] == [1, 2]
    assert run.rows()[-1]["held_out_loss"] == progress.best and "loss" in run.rows()[-1]


def test_a_run_evaluated_before_it_was_stopped_is_evaluated_where_it_ends(tmp_path):
    settings = TrainSettings(lr=0.01, accumulation_steps=1, max_iters=3, save_every=0, eval_every=2)
    batches, held_out = Batches(ragged_rows(4), 1, 0), Batches(ragged_rows(4), 4, 0, seed=None)
    run = Run(tmp_path / "run", {})
    train(lora_model(), token_loss, batches, held_out, settings, FP32, run)
    state, rows = run.load_newest(), run.rows()
    stopped = rows[-1].copy()
    del stopped["held_out_loss"]
    run.replace_last(stopped)  # as a signal at step 3 leaves it
    run.save(state | {"best": rows[1]["held_out_loss"], "best_step": 2}, 3)
    again = Run(tmp_path / "run", {}, resume=True)
    train(lora_model(), token_loss, batches, held_out, settings, FP32, again)
    assert again.rows() == rows


def test_a_complete_run_is_evaluated_only_where_its_last_line_was_lost(tmp_path, capsys):
    settings = TrainSettings(lr=0.01, accumulation_steps=1, max_iters=2)
    batches, held_out = Batches(ragged_rows(4), 1, 0), Batches(ragged_rows(4), 4, 0, seed=None)
    train(lora_model(), token_loss, batches, held_out, settings, FP32, Run(tmp_path / "run", {}))
    for lost in (False, True):
        run = Run(tmp_path / "run", {}, resume=True)
        if lost:
            run.metrics.write_text("")
        capsys.readouterr()
        progress, _ = train(lora_model(), token_loss, batches, held_out, settings, FP32, run)
        assert ("held-out" in capsys.readouterr().out) == lost
        assert (progress.step, progress.best_step) == (2, 2)
    assert run.rows() == []  # no line with half of what a line has


@pytest.mark.parametrize(("schedule", "began", "now", "told"), [
    ("cosine", (1, 2), (1, 4), "began for 2 steps and goes on as that of 4"),
    ("linear", (1, 3), (1, None), "began for 3 steps and goes on as that of 4"),
    ("cosine", (1, 3), (2, 3), None), ("cosine", (1, 4), (1, 9), None),
    ("constant", (1, 2), (1, 4), None), ("cosine", (1, 2), (1, 2), None),
    ("cosine", (1, 4), (1, 2), None),  # it is complete
])  # fmt: skip
def test_a_schedule_that_goes_on_for_another_number_of_steps_is_told(
    schedule, began, now, told, tmp_path, capsys
):
    batches = Batches(ragged_rows(4), 1, 0)
    for (epochs, max_iters), is_first in ((began, True), (now, False)):
        how = {"schedule": schedule, "epochs": epochs, "max_iters": max_iters}
        settings = TrainSettings(lr=0.01, accumulation_steps=1, **how)
        flags = {name.replace("_", "-"): value for name, value in how.items()}
        run = Run(tmp_path / "run", flags, resume=not is_first)
        if is_first and max_iters == 3:  # stopped at 2, so that both go on
            settings = replace(settings, max_iters=2)
        train(lora_model(), token_loss, batches, None, settings, FP32, run)
    err = capsys.readouterr().err
    assert (told in err and err.count("warning") == 1) if told else "warning" not in err


def test_weights_that_give_no_number_are_not_called_good(tmp_path):
    def poisoned(model, batch, calls=itertools.count()):  # noqa: B008
        loss, count = token_loss(model, batch)
        return loss * (math.nan if next(calls) == 2 else 1), count

    settings = TrainSettings(accumulation_steps=1, save_every=0)
    run = Run(tmp_path / "run", {})
    with pytest.raises(NumericError, match=r"good checkpoint is .*_000001.*; .*_000002\.pt holds"):
        train(lora_model(), poisoned, Batches(ragged_rows(4), 1, 0), None, settings, FP32, run)


def test_a_gradient_that_is_no_number_stops_the_run_before_the_weights_take_it():
    model = lora_model()
    before = trainable_state(model)

    def loss_fn(model, batch):
        loss, count = token_loss(model, batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        return loss + sum((p * 0).sum().sqrt() for p in trained), count  # d sqrt(0) is infinite

    with pytest.raises(NumericError, match="gradient of step 1"):
        train(model, loss_fn, Batches(ragged_rows(2), 1, 0), None, TrainSettings(), FP32)
    assert all(torch.equal(before[k], v) for k, v in trainable_state(model).items())


def test_an_overflowing_fp16_step_is_taken_again_with_the_same_samples(tmp_path):
    """A skipped step used to lose its samples, and a run could end without an evaluation."""
    run = Run(tmp_path / "run", {})
    settings = TrainSettings(lr=0.01, accumulation_steps=1, epochs=2)
    batches, held_out = Batches(ragged_rows(8), 8, 0), Batches(ragged_rows(4), 4, 0, seed=None)
    precision = choose_precision("fp16", "cpu")
    progress, _ = train(lora_model(), token_loss, batches, held_out, settings, precision, run)
    assert progress.step == 2 and math.isfinite(progress.best) and len(run.rows()) == 2


def test_a_plain_tuple_is_a_batch():
    tokens = torch.randint(0, 2048, (2, 9))
    assert evaluate(lora_model(), token_loss, [(tokens, tokens)], FP32) > 0


def test_checkpoints_come_with_the_clock_and_at_the_end(tmp_path, monkeypatch):
    """20 s pass between looks at the clock, of which each step takes one."""
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr("minillm.training.time.monotonic", lambda: next(clock))
    saved = []
    monkeypatch.setattr(Run, "save", lambda self, state, step: saved.append(step))
    settings = TrainSettings(accumulation_steps=1, epochs=1, save_every=1.0)
    run = Run(tmp_path / "run", {})
    train(lora_model(), token_loss, Batches(ragged_rows(8), 1, 0), None, settings, FP32, run)
    assert saved == [4, 8]


def test_a_signal_during_the_last_save_is_not_lost(tmp_path, monkeypatch):
    save = Run.save

    def told_to_stop(self, state, step):
        signal.raise_signal(signal.SIGTERM)
        return save(self, state, step)

    monkeypatch.setattr(Run, "save", told_to_stop)
    settings = TrainSettings(accumulation_steps=8, max_iters=1)
    run = Run(tmp_path / "run", {})
    with pytest.raises(Interrupted, match="kept .*step_000001"):
        train(lora_model(), token_loss, Batches(ragged_rows(8), 1, 0), None, settings, FP32, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_one_token_predict_nothing_and_train_nothing(dtype):
    model, tokens = Llama(small_config()).to(dtype), torch.ones(2, 1, dtype=torch.int64)
    loss, count = token_loss(model, (tokens, tokens))
    loss.backward()
    assert (float(loss.detach()), int(count)) == (0.0, 0)


def test_a_run_follows_its_schedule(tmp_path):
    run = Run(tmp_path / "run", {})
    settings = TrainSettings(lr=0.01, schedule="linear", warmup=2, accumulation_steps=1)
    train(lora_model(), token_loss, Batches(ragged_rows(6), 1, 0), None, settings, FP32, run)
    assert [row["lr"] for row in run.rows()] == [lr_at(step, 6, settings) for step in range(6)]


def test_the_logged_gradient_norm_of_fp16_is_that_of_fp32(tmp_path):
    """Not that of the scaled loss, by which clipping would cut everything."""
    norms, settings = [], TrainSettings(max_iters=1)
    for name in ("fp16", "fp32"):
        run, precision = Run(tmp_path / name, {}), choose_precision(name, "cpu")
        batches = Batches(ragged_rows(8), 2, 0)
        train(lora_model(), token_loss, batches, None, settings, precision, run)
        norms.append(run.rows()[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_what_an_objective_tells_is_logged_as_a_mean(tmp_path):
    def telling(model, batch):
        loss, count = token_loss(model, batch)
        return loss, count, {"half": 0.5 * count}

    run, batches = Run(tmp_path / "run", {}), Batches(ragged_rows(4), 2, 0)
    train(lora_model(), telling, batches, None, TrainSettings(), FP32, run)
    assert run.rows()[0]["half"] == 0.5


def test_a_run_is_evaluated_at_multiples_of_eval_every_and_at_its_end(tmp_path):
    run, rows = Run(tmp_path / "run", {}), ragged_rows(7)
    batches, held_out = Batches(rows, 1, 0), Batches(rows, 4, 0, seed=None)
    settings = TrainSettings(accumulation_steps=1, eval_every=3)
    train(lora_model(), token_loss, batches, held_out, settings, FP32, run)
    assert [row["step"] for row in run.rows() if "held_out_loss" in row] == [3, 6, 7]


def test_the_first_token_is_not_supervised_and_paddings_are_no_tokens(tmp_path):
    rows = [Row(tokens, tokens.clone()) for tokens in (torch.arange(1, 9), torch.arange(1, 4))]
    run = Run(tmp_path / "run", {})
    train(lora_model(), token_loss, Batches(rows, 2, 0), None, TrainSettings(), FP32, run)
    (row,) = run.rows()
    assert row["supervised_tokens"] == sum(r.n_labels for r in rows) == 9 and row["tokens"] == 11


def test_a_new_best_starts_patience_over():
    progress, found = Progress(), []
    for step, loss in enumerate((3.0, 4.0, 2.0, 5.0), 1):
        note_held_out({"step": step, "loss": 0.0, "held_out_loss": loss}, progress, None, None)
        found.append(progress.evaluations_since_best)
    assert found == [0, 1, 0, 1]


@pytest.mark.parametrize(("rows_of_a_sample", "shown"), [(1, "3, 4"), (2, "2")])
def test_a_broken_step_names_its_samples_counted_from_1(rows_of_a_sample, shown):
    batches = Batches(ragged_rows(6), 2, 0, seed=None)
    batches.rows_of_a_sample = rows_of_a_sample
    settings = TrainSettings(accumulation_steps=1)
    error = broken_step(math.nan, 1.0, Progress(step=1), batches, settings, None)
    assert f"training samples {shown})" in str(error)


def test_a_held_out_loss_that_is_no_number_is_an_error():
    model = lora_model()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(NumericError, match="held-out"):
        evaluate(model, token_loss, Batches(ragged_rows(2), 1, 0), FP32)


def test_held_out_samples_without_labels_are_an_error():
    rows = [Row(row.tokens, torch.full_like(row.labels, -100)) for row in ragged_rows(2)]
    with pytest.raises(UserError, match="no supervised token"):
        evaluate(lora_model(), token_loss, Batches(rows, 1, 0), FP32)


def test_a_signal_that_the_process_ignores_does_not_end_its_run():
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup leaves SIGHUP, a shell SIGINT
    try:
        with deferred_signals() as asked:
            signal.raise_signal(signal.SIGINT)
        assert asked.signal is None and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, kept)
