"""What a checkpoint puts back, and what is not made one."""

import math
import random

import pytest
import torch

from minillm.errors import NumericError
from minillm.optimizer import make_optimizer
from minillm.progress import Progress, restore, rng_state, save, set_rng_state
from minillm.runs import Run
from minillm.training import TrainSettings
from tests.conftest import lora_model


def test_the_flag_of_beta2_reaches_the_settings():
    assert TrainSettings.from_flags({"beta2": 0.95}).betas == (0.9, 0.95)


def test_the_loss_scale_is_put_back(tmp_path):
    run, model, settings = Run(tmp_path / "run", {}), lora_model(), TrainSettings()
    before, after = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (8.0, 2.0))
    save(run, Progress(step=1), model, make_optimizer(model, settings), before)
    restore(run, model, make_optimizer(model, settings), after)
    assert after.get_scale() == 8.0


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    run, model = Run(tmp_path / "run", {}), lora_model()
    optimizer, scaler = make_optimizer(model, TrainSettings()), torch.amp.GradScaler("cpu")
    with torch.no_grad():
        model.layers[0].attention.wq.lora_B[0, 0] = math.nan
    with pytest.raises(NumericError, match="holds no numbers"):
        save(run, Progress(step=1), model, optimizer, scaler)
    assert run.newest() is None


def test_every_random_stream_is_put_back():
    state = rng_state()
    drawn = random.random(), torch.rand(3)
    set_rng_state(state)
    assert random.random() == drawn[0] and torch.equal(torch.rand(3), drawn[1])
