"""Memory by category: what is predicted is what is measured, and both are what is known."""

import pytest
import torch

from minillm.adapt.methods import MethodOptions, adapt
from minillm.checkpoint import empty_model
from minillm.data.batches import Row, collate
from minillm.footprint import LiveTensors, measure_footprint, predict_footprint
from minillm.precision import Precision
from tests.conftest import MODELS

KINDS = ("llama-gqa", "gpt2")
PRECISIONS = {  # of the products, and of the frozen weights
    "fp32": ("fp32", torch.float32), "autocast over fp32": ("bf16", torch.float32),
    "16-bit base": ("bf16", torch.bfloat16),
}  # fmt: skip


def batch(rows: int = 2, columns: int = 49, labelled: int = 16):
    tokens = torch.randint(2048, (rows, columns))
    labels = tokens.clone()
    labels[:, :-labelled] = -100
    return collate([Row(t, y) for t, y in zip(tokens, labels, strict=True)], 0)


def prepared(kind, precision, method="lora", meta=False, tokenizer=None):
    name, dtype = PRECISIONS[precision]
    model = (empty_model(MODELS[kind]) if meta else MODELS[kind]()).to(dtype)
    targets = ("wq", "wv") if kind.startswith("llama") else ("c_attn",)
    options = MethodOptions(targets=targets, rank=4, virtual_tokens=4)
    model, _ = adapt(model, tokenizer, method, options)
    return model, Precision(name, torch.device("cpu"))


def measured(kind: str, precision: str, method: str = "lora", steps: int = 8, **changes):
    model, how = prepared(kind, precision, method)
    model.gradient_checkpointing = changes.pop("checkpointing", False)
    return measure_footprint(model, batch(**changes), how, steps)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "full", "prefix_tuning"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_predicted_is_measured(kind, precision, method, checkpointing, tokenizer):
    model, how = prepared(kind, precision, method, tokenizer=tokenizer)
    getattr(model, "model", model).gradient_checkpointing = checkpointing
    found = measure_footprint(model, batch(), how, 8).rows()
    predicted = predict_footprint(model, batch(), how, 8).rows()
    assert predicted == pytest.approx(found, rel=0.02, abs=2048)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_weights_predicts_the_same(kind):
    real, how = prepared(kind, "16-bit base")
    nowhere, _ = prepared(kind, "16-bit base", meta=True)
    assert predict_footprint(nowhere, batch(), how, 8) == predict_footprint(real, batch(), how, 8)
    assert all(p.is_meta for p in nowhere.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_gradients_and_optimizer_state_are_their_numbers(kind):
    model, how = prepared(kind, "16-bit base")
    found = measure_footprint(model, batch(), how, 8)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert (found.frozen, found.trainable) == (2 * frozen, 4 * trainable)
    assert (found.gradients, found.optimizer) == (4 * trainable, 8 * trainable)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("autocast over fp32", 2)])
def test_logits_are_those_of_labelled_positions_alone(precision, size):
    assert measured("gpt2", precision, "full").logits == 2 * 16 * 2048 * size


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_of_a_frozen_head_are_not_kept(precision):
    assert measured("gpt2", precision).logits == 0


def test_autocast_over_fp32_copies_every_matrix_it_meets():
    model, how = prepared("llama-gqa", "autocast over fp32")
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    # an embedding is looked up, not multiplied with; a frozen head is met in slices and kept by
    # nothing; nothing needs a gradient below LoRA's first B
    unmet = ("tok_embeddings", "output", "layers.0.attention.wq.weight", "layers.0.attention.wk",
             "layers.0.attention.wv.weight", "layers.0.attention.wq.lora_A",
             "layers.0.attention.wv.lora_A")  # fmt: skip
    met = [p for name, p in matrices.items() if not name.startswith(unmet)]
    expected = 2 * sum(p.numel() for p in met)
    assert measure_footprint(model, batch(), how, 8).copies == expected


@pytest.mark.parametrize("precision", ["fp32", "16-bit base"])
def test_a_base_in_the_compute_dtype_is_not_copied(precision):
    model, how = prepared("llama-gqa", precision)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert measure_footprint(model, batch(), how, 8).copies <= 2 * trained


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_over_fp32_raises_the_peak_where_weights_outweigh_activations(kind):
    rows = {"rows": 1, "columns": 17, "labelled": 2}
    mixed, plain = (measured(kind, p, **rows) for p in ("autocast over fp32", "fp32"))
    stored = measured(kind, "16-bit base", **rows)
    assert stored.total < plain.total < mixed.total
    assert mixed.activations < plain.activations


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_a_blocks_input_alone(kind):
    plain, spare = (measured(kind, "fp32", checkpointing=on) for on in (False, True))
    assert spare.activations < plain.activations / 3 and spare.total < plain.total
    assert plain.frozen == spare.frozen and plain.gradients == spare.gradients


def test_activations_are_told_by_block():
    found = measured("gpt2", "fp32").by_place
    assert found["block 1"] > 0 and found["block 1"] >= found["block 0"] > 0
    assert set(found) <= {"block 0", "block 1", "outside"}


def test_accumulation_divides_activations_not_gradients():
    together = measured("llama-gqa", "fp32", "full", steps=1, rows=8)
    apart = measured("llama-gqa", "fp32", "full", steps=8, rows=1)
    assert apart.activations == pytest.approx(together.activations / 8, rel=0.1)
    assert apart.gradients == together.gradients


def test_measuring_leaves_gradients_mode_and_random_numbers_alone():
    model, how = prepared("gpt2", "fp32")
    model.eval()
    fed, before = batch(), torch.get_rng_state()
    measure_footprint(model, fed, how, 8)
    assert torch.equal(before, torch.get_rng_state()) and not model.training
    assert all(p.grad is None for p in model.parameters())


def test_live_tensors_forgets_what_is_freed():
    with LiveTensors([]) as live:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        del a, b
        c = torch.zeros(500)
    assert (live.now, live.peak) == (4 * 1500, 4 * 2000)  # the view keeps all of b
    del view, c
    assert live.now == 0


def test_the_cache_is_that_of_the_models_key_heads():
    assert measured("llama-gqa", "16-bit base").cache == 2 * 2 * 2 * 2 * 48 * 8 * 2
