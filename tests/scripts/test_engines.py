"""Our side of the benchmark: it does what it says it is timed at, and counts what bounds it."""

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

from gpt2 import GPT2
from llama import Llama
from minillm.adapt.lora import lora_layers
from minillm.flops import training_flops
from tests.conftest import TINY_GPT2, TINY_LLAMA
from tools.benchmark import decode_curves, training_rows
from tools.engines import Ours, Setup
from tools.models import family_of


def engine(folder=TINY_GPT2, dtype: str = "fp32", **changes) -> Ours:
    return Ours(Setup(folder, 2, dtype, "cpu", family_of(folder).targets, **changes))


@pytest.mark.parametrize(("use_cache", "columns"), [(True, [5, 1, 1]), (False, [5, 6, 7])])
def test_every_token_is_timed_with_or_without_the_cache(use_cache, columns):
    ours, seen = engine(), []

    def watch(module, args):
        if isinstance(module, GPT2):
            seen.append(args[0].size(1))

    handle = register_module_forward_pre_hook(watch)
    seconds = ours.decode([1, 2, 3, 4, 5], 3, use_cache)
    handle.remove()
    assert seen == columns and len(seconds) == 3 and min(seconds) > 0


def test_it_is_set_up_as_asked():
    ours = engine(dtype="bf16", gradient_checkpointing=True, lora_dropout=0.25)
    assert {p.dtype for p in ours.model.parameters()} == {torch.bfloat16}
    ours.prepare_training()
    assert ours.model.gradient_checkpointing and ours.model.training
    layers = lora_layers(ours.model).values()
    assert {layer.lora_dropout.p for layer in layers} == {0.25} and len(layers) == 2


@pytest.mark.parametrize(("size", "pack"), [(2, None), (1, 64)])
def test_the_rows_of_a_forward_are_those_asked_for(size, pack):
    (rows,) = training_rows(None, None, family_of(TINY_GPT2), 0.0, 10, 6, 2048)
    batch = engine(batch_size=size, pack=pack)._batches(rows).group(0, 6)[0]
    assert batch.tokens.size(0) == (size if pack is None else 1)
    assert (getattr(batch, "segments", None) is not None) == (pack is not None)


def test_an_optimizer_step_takes_all_rows_whatever_fits_a_forward():
    ours = engine(batch_size=2)
    (rows,) = training_rows(None, None, family_of(TINY_GPT2), 0.0, 10, 5, 2048)
    ours.prepare_training()
    steps = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: steps.append(optimizer))
    ours.train_step(rows)
    handle.remove()
    assert len(steps) == 1


@pytest.mark.parametrize("folder", [TINY_GPT2, TINY_LLAMA])
def test_a_token_has_to_read_the_blocks_the_head_and_the_cache(folder):
    ours = engine(folder)
    model = ours.model  # both heads are the token embedding itself
    read = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("wpe"))
    per_column = 2 * model.config.head_dim * 4 * len(model.blocks)
    per_column *= getattr(model.config, "n_kv_heads", model.config.n_heads)
    final_norm = sum(p.nbytes for name, p in model.named_parameters()
                     if name.startswith(("ln_f", "norm")))  # fmt: skip
    assert ours.decode_bytes(10) == read - final_norm + 10 * per_column


@pytest.mark.parametrize("folder", [TINY_GPT2, TINY_LLAMA])
def test_the_operations_of_a_prompt_are_those_pytorch_counts(folder):
    ours = engine(folder)
    tokens, last = torch.arange(1, 13)[None], torch.zeros(1, 12, dtype=torch.bool)
    last[0, -1] = True
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(
        display=False) as counter:  # fmt: skip
        ours.model(tokens, logits_at=last)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    assert ours.prefill_flops(12) == products


def test_the_operations_of_a_step_count_tokens_that_are_fed_and_labels_that_are_asked():
    ours = engine()
    ours.prepare_training()
    (rows,) = training_rows(None, None, family_of(TINY_GPT2), 0.5, 20, 3, 2048)
    assert ours.training_flops(rows) == training_flops(ours.model, 60, 30, 3)


def test_a_curve_shows_each_engine_at_each_length():
    rows = [
        {"what": f"a token at {n}, {kind}", "dtype": "fp32", "minillm": n + add,
         "transformers": 2 * n + add}
        for n in (32, 64) for kind, add in (("cached", 0.5), ("no cache", 0.25))
    ]  # fmt: skip
    assert decode_curves([{"what": "decode 64 + 128"}, *rows]) == {
        "minillm fp32, cached": {32: 32.5, 64: 64.5},
        "transformers fp32, cached": {32: 64.5, 64: 128.5},
        "minillm fp32, no cache": {32: 32.25, 64: 64.25},
        "transformers fp32, no cache": {32: 64.25, 64: 128.25},
    }


def test_both_engines_know_the_same_model():
    ours = engine(TINY_LLAMA)
    assert isinstance(ours.model, Llama)
    assert ours.facts() == (ours.model.config.vocab_size, ours.model.config.max_seq_len)
    want = ours.model(torch.tensor([[1, 5, 9]]))[0]
    assert torch.equal(ours.logits([1, 5, 9]), want.detach().float())
