"""AdamW as it is told, the schedule of its rate, and steps that fp16 skips."""

import math

import pytest
import torch
from torch import nn

from llama import Llama
from minillm.data.batches import Batches, Row
from minillm.errors import NumericError, UserError
from minillm.losses import token_loss
from minillm.optimizer import lr_at, make_optimizer, take_step
from minillm.progress import Progress
from minillm.training import TrainSettings, train
from tests.conftest import FP32, lora_model, ragged_rows, small_config


def test_adamw_takes_its_betas_and_decays_matrices_alone():
    settings = TrainSettings(weight_decay=0.1, betas=(0.8, 0.95))
    groups = make_optimizer(Llama(small_config()), settings).param_groups
    assert all(group["betas"] == (0.8, 0.95) for group in groups)
    decays = {(p.dim(), group["weight_decay"]) for group in groups for p in group["params"]}
    assert decays == {(2, 0.1), (1, 0.0)}


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


def test_only_overflows_in_a_row_count():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler, progress, found = torch.amp.GradScaler("cpu"), Progress(), []
    for factor in (math.inf, 1.0, math.inf):
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.unscale_(optimizer)
        take_step(scaler, optimizer, progress)
        found.append(progress.skipped_in_a_row)
    assert found == [1, 0, 1]


def test_a_step_without_any_label_changes_nothing():
    rows = [Row(row.tokens, torch.full_like(row.labels, -100)) for row in ragged_rows(2)]
    model = lora_model()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, token_loss, Batches(rows, 1, 0), None, TrainSettings(), FP32)
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_trained_in_16_bits_is_refused_by_name(dtype):
    model = lora_model()
    for name, p in model.named_parameters():
        p.data = p.data.to(dtype if not p.requires_grad or "layers.1" in name else torch.float32)
    with pytest.raises(UserError, match=r"layers\.1\..*lora_A is trained in 16 bits"):
        make_optimizer(model, TrainSettings())


def test_what_is_frozen_may_be_in_16_bits():
    model = lora_model()
    for p in model.parameters():
        p.data = p.data if p.requires_grad else p.data.to(torch.bfloat16)
    assert make_optimizer(model, TrainSettings()).param_groups
