"""The loop: accumulation, schedules, counting, and what it refuses to do silently."""

import itertools
import math
import signal

import pytest
import torch
from torch import nn

from llama import Llama
from minillm import add_lora, mark_only_lora_as_trainable
from minillm.data.batches import Batches, Row
from minillm.errors import Interrupted, NumericError, UserError
from minillm.losses import token_loss
from minillm.optimizer import lr_at, take_step
from minillm.precision import choose_precision
from minillm.progress import Progress, trainable_state
from minillm.runs import Run, fresh_folder
from minillm.training import TrainSettings, check_step, evaluate, train
from tests.conftest import sharp, small_config

FP32 = choose_precision("fp32", "cpu")


def ragged_rows(n: int, seed: int = 0) -> list[Row]:
    """Rows of 5 to 40 tokens of which the last 1 to half are supervised."""
    stream = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        length = int(torch.randint(5, 40, (), generator=stream))
        tokens = torch.randint(0, 2048, (length,), generator=stream)
        labels = tokens.clone()
        labels[: int(torch.randint(length // 2, length - 1, (), generator=stream))] = -100
        rows.append(Row(tokens, labels))
    return rows


def lora_model(dropout: float = 0.0) -> Llama:
    torch.manual_seed(0)
    model = sharp(Llama(small_config()))
    add_lora(model, ("wq", "wv"), rank=4, alpha=8, dropout=dropout)
    return mark_only_lora_as_trainable(model)


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


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_schedule_warms_up_then_follows_its_shape(schedule):
    settings = TrainSettings(lr=2.0, schedule=schedule, warmup=4)
    rates = [lr_at(step, 20, settings) for step in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    if schedule == "constant":
        assert set(rates[4:]) == {2.0}
    else:
        assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.3
        assert rates[12] == pytest.approx(1.0)  # half-way


def test_a_skipped_step_moves_neither_schedule_nor_count():
    """Planted: a scaler that overflows at its second step."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    progress = Progress()
    for bad in (False, True, False):
        loss = model(torch.ones(1, 2)).sum() * (float("inf") if bad else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert take_step(scaler, optimizer, progress) is not bad
    assert progress.step == 2 and scaler.get_scale() == 2.0


def test_twenty_overflows_in_a_row_are_a_numeric_error():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler, progress = torch.amp.GradScaler("cpu"), Progress()
    with pytest.raises(NumericError, match="20 steps"):
        for _ in range(20):
            scaler.scale(model(torch.ones(1, 2)).sum() * float("inf")).backward()
            scaler.unscale_(optimizer)
            take_step(scaler, optimizer, progress)
    assert progress.skipped_in_a_row == 20


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


def test_auto_precision_is_native_bf16_or_a_safe_choice(monkeypatch):
    import minillm.precision as precision

    monkeypatch.setattr(precision, "has_native_bf16", lambda device: False)
    assert choose_precision("auto", "cpu").name == "fp32"
    assert choose_precision("auto", "cuda").name == "fp16"
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: True)
    assert choose_precision("auto", "cpu").dtype == torch.bfloat16
    assert choose_precision("fp16", "cpu").scaler().is_enabled()
    assert not choose_precision("bf16", "cpu").scaler().is_enabled()


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


def test_a_run_killed_before_its_first_checkpoint_begins_again_without_doubled_lines(tmp_path):
    run = Run(tmp_path / "run", {})
    run.log({"step": 1})
    assert run.load_newest() is None and run.rows() == []


def test_a_resumed_run_out_of_patience_stays_stopped(tmp_path):
    settings = TrainSettings(lr=0.0, epochs=20, accumulation_steps=1, eval_every=1, patience=2)
    batches, held_out = Batches(ragged_rows(4), 4, 0), Batches(ragged_rows(4), 4, 0, seed=None)
    for resume in (False, True):
        run = Run(tmp_path / "run", {}, resume)
        train(lora_model(), token_loss, batches, held_out, settings, FP32, run)
        assert [row["step"] for row in run.rows()] == [1, 2, 3]


def test_runs_without_a_name_that_begin_together_get_folders_of_their_own(tmp_path):
    folders = [fresh_folder(tmp_path, "run") for _ in range(3)]
    assert [folder.name for folder in folders] == ["run-001", "run-002", "run-003"]
    Run(folders[0], {})  # a folder so made is taken as it is


def test_a_log_that_ends_in_broken_bytes_is_read_up_to_them(tmp_path):
    run = Run(tmp_path / "run", {})
    run.log({"step": 1})
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 2, "lo\xff\xfe')
    assert run.rows() == [{"step": 1}]


def test_a_checkpoint_of_something_else_is_named(tmp_path):
    run = Run(tmp_path / "run", {})
    run.save({"step": 1}, 1)
    batches = Batches(ragged_rows(2), 1, 0)
    with pytest.raises(UserError, match=r"step_000001\.pt: no checkpoint of a run"):
        train(lora_model(), token_loss, batches, None, TrainSettings(), FP32, run)


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


def test_the_best_weights_of_a_step_that_a_crash_undid_are_not_taken_for_another(tmp_path):
    run = Run(tmp_path / "run", {})
    run.save_best({"w": torch.ones(2)}, 2)
    assert torch.equal(run.load_best(2)["w"], torch.ones(2))
    with pytest.raises(UserError, match="is of step 2"):
        run.load_best(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_one_token_predict_nothing_and_train_nothing(dtype):
    model, tokens = Llama(small_config()).to(dtype), torch.ones(2, 1, dtype=torch.int64)
    loss, count = token_loss(model, (tokens, tokens))
    loss.backward()
    assert (float(loss.detach()), int(count)) == (0.0, 0)


def test_a_run_of_an_older_version_goes_on(tmp_path):
    begin_and_resume(tmp_path / "run", {}, identity={"model": "abc"})
    torch.save({"w": torch.ones(2)}, tmp_path / "run" / "best.pt")  # the weights alone
    now = {"model": {"bfloat16": "abc", "float16": "def"}}  # then one hash, now two
    run = Run(tmp_path / "run", {}, True, identity=now)
    assert run.load_newest()["step"] == 3 and torch.equal(run.load_best(3)["w"], torch.ones(2))
    with pytest.raises(UserError, match="another model"):
        Run(tmp_path / "run", {}, True, identity={"model": {"bfloat16": "x"}}).load_newest()
