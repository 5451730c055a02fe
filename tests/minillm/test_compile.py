"""--compile: the loss by torch.compile trains what the plain one does."""

import os
import shutil

import pytest
import torch

from minillm import add_lora, mark_only_lora_as_trainable
from minillm.data.batches import Batches
from minillm.data.preferences import PairBatches
from minillm.dpo import DPO
from minillm.losses import token_loss
from minillm.progress import trainable_state
from minillm.training import TrainSettings, train
from tests.conftest import FP32, MODELS, ragged_rows

TARGETS = {"gpt2": ("c_attn",), "llama-gqa": ("wq", "wv")}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [*TARGETS])
def test_a_compiled_run_ends_where_a_plain_one_does(kind, checkpointing):
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = MODELS[kind]()
        add_lora(model, TARGETS[kind], rank=4, alpha=8, dropout=0.0)
        mark_only_lora_as_trainable(model).gradient_checkpointing = checkpointing
        batches = Batches(ragged_rows(6), 2, 0, seed=None)
        settings = TrainSettings(lr=1e-3, accumulation_steps=2, compile=compiled)
        train(model, token_loss, batches, list(batches), settings, FP32)
        ends.append(trainable_state(model))
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_a_compiled_run_on_preferences_ends_where_a_plain_one_does():
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = MODELS["llama-gqa"]()
        add_lora(model, ("wq", "wv"), rank=4, alpha=8, dropout=0.0)
        mark_only_lora_as_trainable(model)
        batches = PairBatches(ragged_rows(8), 4, 0, seed=None)
        settings = TrainSettings(lr=1e-3, eval_every=1, compile=compiled)
        train(model, DPO(model, 0.1), batches, list(batches), settings, FP32)
        ends.append(trainable_state(model))
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-4)
