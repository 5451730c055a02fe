"""LoRALinear: identity at the start, exact un-merge, and no state in which it lies."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from gpt2 import GPT2, GPT2Config
from llama import Llama
from minillm import LoRALinear, add_lora, generate, lora_state_dict, mark_only_lora_as_trainable
from minillm.adapt.bottleneck import add_adapters
from minillm.adapt.lora import evaluating, fold_lora, lost_in_merging
from minillm.adapt.lora_parts import LoRAParts
from minillm.errors import UserError
from minillm.losses import token_loss
from minillm.precision import Precision
from minillm.training import evaluate
from tests.conftest import equal_states, sharp, small_config, small_gpt2

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def trained_layer(dtype=torch.float32, **kwargs) -> LoRALinear:
    layer = LoRALinear(12, 20, dtype=dtype, lora_rank=3, lora_alpha=6, **kwargs)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.fixture
def model() -> Llama:
    model = sharp(Llama(small_config()))
    add_lora(model, ("wq", "wv"), rank=4, alpha=8, dropout=0.0)
    for name, p in mark_only_lora_as_trainable(model).named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, 0, 0.1)
    return model


def make_faint(model) -> None:
    """Makes the update so small that merged 16-bit weights would round it away."""
    for name, p in model.named_parameters():
        p.data.mul_(1e-3 if name.endswith("lora_B") else 1)


def test_rank_0_is_a_plain_linear():
    layer = LoRALinear(4, 3, lora_rank=0)
    for name in ("lora_A", "lora_B", "lora_scaling", "lora_dropout"):
        assert not hasattr(layer, name)
    assert not layer.is_lora() and not layer.has_weights_merged
    layer.has_weights_merged = True
    for mode in (False, True):
        assert layer.train(mode).has_weights_merged  # nothing of LoRA's is touched
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_construction_draws_the_base_twice_then_a():
    torch.manual_seed(2024)
    layer = LoRALinear(6, 5, lora_rank=2, lora_alpha=4)
    torch.manual_seed(2024)
    plain = nn.Linear(6, 5)
    plain.reset_parameters()
    a = nn.init.kaiming_uniform_(torch.empty(2, 6), a=5**0.5)
    assert torch.equal(layer.weight, plain.weight) and torch.equal(layer.bias, plain.bias)
    assert torch.equal(layer.lora_A, a) and not layer.lora_B.any()
    assert layer.lora_scaling == 2 and not layer.lora_A.requires_grad


def test_it_starts_as_the_identity():
    linear = nn.Linear(12, 20)
    layer = LoRALinear.from_linear(linear, 4, 8, 0.5)
    x = torch.randn(3, 12)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight


def test_forward_is_base_plus_scaled_product_of_the_dropped_input():
    layer = trained_layer(lora_dropout=0.4)
    x = torch.randn(5, 12)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = layer.lora_dropout(x)
    want = x @ layer.weight.T + layer.bias + 2 * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_1000_toggles_with_training_between_leave_the_base_bit_identical(dtype):
    """Adding and subtracting the product instead changes two thirds of the weights."""
    layer = mark_only_lora_as_trainable(trained_layer(dtype))
    base = layer.weight.detach().clone()
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.01)
    x = torch.randn(4, 12, dtype=dtype)
    for _ in range(1000):
        layer.train()
        layer(x).float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.eval()
    assert not torch.equal(layer.weight, base)
    assert torch.equal(layer.train().weight, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_16_bits_are_merged_in_fp32_and_rounded_once(dtype):
    layer = trained_layer().to(dtype)
    a, b, base = (x.detach().float() for x in (layer.lora_A, layer.lora_B, layer.weight))
    expected = (base + layer.lora_scaling * (b @ a)).to(dtype)
    assert torch.equal(layer.eval().weight, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [*zip(DTYPES, (1e-5, 0.1, 0.01), strict=True)])
def test_merged_and_unmerged_outputs_agree(model, dtype, tolerance):
    model.to(dtype)
    tokens = torch.randint(0, 2048, (2, 20))
    unmerged = model.train()(tokens).float()
    merged = model.eval()(tokens).float()
    assert model.layers[0].attention.wq.has_weights_merged
    scale = unmerged.abs().max()
    torch.testing.assert_close(merged / scale, unmerged / scale, atol=tolerance, rtol=0)


def test_toggling_the_parent_toggles_the_layer_and_returns_self(model):
    """nn.Module.eval() calls train(False) on children: an eval() of the layer would never run."""
    layer = model.layers[0].attention.wq
    assert model.eval() is model and layer.has_weights_merged
    assert layer.eval() is layer and layer.train() is layer and not layer.has_weights_merged


def test_what_is_frozen_while_merged_stays_frozen():
    """A baseline is measured in eval mode, then LoRA is added: each layer merges at once."""
    model = Llama(small_config()).eval()
    add_lora(model, ("wq", "wv"), rank=4, alpha=8)
    mark_only_lora_as_trainable(model).train()
    trained = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_what_is_evaluated_in_16_bits_is_what_was_trained(model, dtype):
    """An update that the merged weights would round away."""
    make_faint(model)
    model.to(dtype).train()
    tokens = torch.randint(0, 2048, (2, 20))
    trained = model(tokens)
    with evaluating(model):
        found = model(tokens)
    if dtype == torch.float64:
        torch.testing.assert_close(found, trained, atol=1e-10, rtol=0)
    else:
        assert torch.equal(found, trained) and not torch.equal(model.eval()(tokens), trained)


def test_under_autocast_evaluating_answers_as_what_was_trained_too(model):
    """Whose products round W + BA, also where the weight is fp32."""
    make_faint(model)
    tokens = torch.randint(0, 2048, (2, 20))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = model.train()(tokens)
        with evaluating(model):
            assert torch.equal(model(tokens), trained)
        assert not torch.equal(model.eval()(tokens), trained)


def test_a_held_out_loss_under_autocast_is_that_of_what_was_trained(model):
    make_faint(model)
    tokens = torch.randint(0, 2048, (2, 20))
    precision = Precision("bf16", torch.device("cpu"))
    with torch.no_grad(), precision.autocast():
        loss, count = token_loss(model.train(), (tokens, tokens))
    assert evaluate(model, token_loss, [(tokens, tokens)], precision) == float(loss) / int(count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [True, False])
def test_evaluating_drops_nothing_and_gives_every_mode_back(dtype, mode):
    model = Llama(small_config()).to(dtype)
    add_lora(model, ("wq", "wv"), rank=4, alpha=8, dropout=0.5)
    model.train(mode)
    tokens = torch.randint(0, 2048, (2, 20))
    for p in (p for name, p in model.named_parameters() if name.endswith("lora_B")):
        nn.init.normal_(p, 0, 0.1)
    before = [(module.training, getattr(module, "has_weights_merged", None))
              for module in model.modules()]  # fmt: skip
    with evaluating(model):
        assert not model.training and torch.equal(model(tokens), model(tokens))
        model.layers[0].attention.wq.enabled = False
        model.layers[0].attention.wq.enabled = True
        assert torch.equal(model(tokens), model(tokens))
    after = [(module.training, getattr(module, "has_weights_merged", None))
             for module in model.modules()]  # fmt: skip
    assert after == before


def test_state_dict_shows_the_base_while_merged(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_loading_while_merged_loads_the_base_and_merges_it(model):
    other = sharp(copy.deepcopy(model)).eval()
    tokens = torch.randint(0, 2048, (1, 9))
    model.eval()
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(tokens), other(tokens))
    assert equal_states(model.train(), other.train())


def test_a_deepcopy_while_merged_is_independent_and_right(model):
    tokens = torch.randint(0, 2048, (1, 9))
    want = model.eval()(tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens), want)
    with torch.no_grad():
        twin.layers[0].attention.wq.lora_B.mul_(2)
    assert not torch.equal(twin(tokens), want) and torch.equal(model(tokens), want)
    assert equal_states(twin.train().layers[1], model.train().layers[1])


def test_moving_while_merged_moves_base_and_merge(model):
    base = model.layers[0].attention.wq.weight.detach().clone()
    tokens = torch.randint(0, 2048, (1, 9))
    want = model.eval()(tokens)
    model.double()
    torch.testing.assert_close(model(tokens).float(), want, atol=1e-4, rtol=0)
    assert torch.equal(model.train().layers[0].attention.wq.weight, base.double())


@pytest.mark.parametrize(
    "change",
    ["in place", "data", "data in place", "load", "scale", "optimizer", "fused optimizer"],
)
def test_a_change_of_a_or_b_while_merged_is_merged_anew(change):
    layer = mark_only_lora_as_trainable(trained_layer()).eval()
    x = torch.randn(2, 12)
    layer(x)
    if change == "in place":
        with torch.no_grad():
            layer.lora_B.add_(1)
    elif change == "data":
        layer.lora_B.data = layer.lora_B.data + 1
    elif change == "data in place":
        layer.lora_B.data.add_(1)
    elif change == "load":
        layer.load_state_dict({"lora_A": layer.lora_A + 1}, strict=False)
    elif change == "scale":
        layer.lora_scaling *= 3
    else:
        layer.lora_A.grad = torch.ones_like(layer.lora_A)
        torch.optim.AdamW([layer.lora_A], lr=1.0, fused=change == "fused optimizer").step()
    torch.testing.assert_close(layer(x), layer.train()(x), atol=1e-5, rtol=1e-5)


def test_disabled_is_the_base_in_both_modes():
    layer = trained_layer()
    x = torch.randn(2, 12)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    layer.enabled = False
    assert torch.equal(layer(x), base) and torch.equal(layer.eval()(x), base)
    layer.enabled = True
    assert layer.has_weights_merged and not torch.equal(layer(x), base)
    layer.enabled = False
    assert torch.equal(layer(x), base)


def test_a_flag_set_by_hand_unmerges_by_subtraction():
    layer = trained_layer()
    base, x = layer.weight.detach().clone(), torch.randn(2, 12)
    layer.weight.data += layer.delta()
    layer.has_weights_merged = True
    want = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), want) and torch.equal(layer.eval()(x), want)
    layer.train()
    assert not layer.has_weights_merged
    torch.testing.assert_close(layer.weight.detach(), base)


def test_merging_inside_inference_mode_leaves_a_trainable_layer(model):
    tokens = torch.randint(0, 2048, (1, 9))
    with torch.inference_mode():
        generate(model, [[1, 2]], 3)
        model.eval()(tokens)
    model.eval()(tokens)
    model.train()(tokens).sum().backward()
    assert model.layers[0].attention.wq.lora_A.grad.abs().sum() > 0


def test_merging_does_not_touch_a_shared_weight():
    linear = nn.Linear(12, 20)
    weight = linear.weight.detach().clone()
    layer = LoRALinear.from_linear(linear, 4, 8)
    nn.init.normal_(layer.lora_B)
    storage = linear.weight.data
    layer.eval()
    assert torch.equal(storage, weight)
    layer.train()
    assert torch.equal(linear.weight, weight) and layer.weight is linear.weight


def test_two_layers_that_share_a_weight_do_not_merge_into_each_other():
    """Merging into the shared parameter's storage left it changed for good."""
    linear = nn.Linear(12, 20)
    weight, x = linear.weight.detach().clone(), torch.randn(2, 12)
    plain = linear(x)
    one, two = (LoRALinear.from_linear(linear, 4, 8) for _ in range(2))
    nn.init.normal_(one.lora_B), nn.init.normal_(two.lora_B)
    want = one(x), two(x)
    one.eval(), two.eval()
    for layer, output in zip((one, two), want, strict=True):
        torch.testing.assert_close(layer(x), output, atol=1e-5, rtol=1e-5)
    assert torch.equal(linear(x), plain)
    one.train(), two.train()
    assert torch.equal(linear.weight, weight) and one.weight is two.weight is linear.weight


def test_eval_again_with_the_same_a_and_b_merges_nothing():
    layer = trained_layer().eval()
    merged = layer.weight
    assert layer.eval().weight is merged


def test_eval_again_merges_a_and_b_as_they_are_now():
    layer = trained_layer().eval()
    layer.lora_B.data.add_(1)
    merged = layer.eval().weight.clone()
    torch.testing.assert_close(merged, layer.train().weight + layer.delta())


def test_resetting_a_merged_layer_resets_the_base():
    layer = trained_layer().eval()
    layer.reset_parameters()
    assert torch.equal(layer.weight, layer.train().weight)  # B is zero again


def test_only_a_and_b_train_and_only_they_move(model):
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(lora_state_dict(model)) and len(trainable) == 8
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trainable}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.eval().train()(torch.randint(0, 2048, (2, 9))).pow(2).mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == (name in trainable)
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_mark_returns_the_model_and_takes_a_bare_layer():
    layer = trained_layer()
    assert mark_only_lora_as_trainable(layer) is layer
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ("wq", "wz")}, "wz.*there are.*wq"),
        ({"targets": ("norm",)}, "norm"),
        ({"targets": ("q",)}, "'q' matches no layer"),  # the end of a name is no name
        ({"targets": ("wk",), "rank": 17}, "between 1 and 16"),
        ({"targets": "wq"}, "LoRA targets 'wq': one text; give a list"),
        ({"rank": 0}, "layers.0.attention.wq"),
        ({"rank": 33}, "between 1 and 32"),
        ({"rank": 2.5}, "between 1 and 32"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_what_cannot_be_adapted_is_named_and_nothing_changes(arguments, message):
    model = Llama(small_config())
    before = [type(m) for m in model.modules()]
    with pytest.raises(UserError, match=message):
        add_lora(model, **({"targets": ("wq",)} | arguments))
    assert [type(m) for m in model.modules()] == before


def test_a_rank_may_be_a_whole_number_of_any_kind():
    assert add_lora(Llama(small_config()), ("wq",), rank=np.int64(4)) == 2


def test_wrapping_twice_is_an_error_that_names_the_module(model):
    with pytest.raises(UserError, match=r"layers\.0\.attention\.wv"):
        add_lora(model, ("wv",))


@pytest.mark.parametrize(("rank", "targets", "count"), [
    (16, ("wq", "wv"), 8_388_608), (8, ("wq", "wv"), 4_194_304),
    (16, ("wq", "wk", "wv", "wo", "w1", "w2", "w3"), 39_976_960),
])  # fmt: skip
def test_llama_2_7b_has_the_published_number_of_trainable_parameters(rank, targets, count):
    from llama import LlamaConfig
    from minillm.checkpoint import empty_model

    model = empty_model(lambda: Llama(LlamaConfig.preset("llama-2-7b")))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    add_lora(model, targets, rank)
    mark_only_lora_as_trainable(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_folding_a_layer_that_is_switched_off_is_refused(model):
    model.layers[0].attention.wq.enabled = False
    with pytest.raises(UserError, match="switched off"):
        fold_lora(model)


def test_folding_leaves_plain_layers_with_the_same_output(model):
    tokens = torch.randint(0, 2048, (1, 9))
    want = model.eval()(tokens)
    assert fold_lora(model) == 4 and not lora_state_dict(model)
    assert torch.equal(model(tokens), want)


@pytest.fixture(params=[("q", "v"), ("v",), ("q", "k", "v"), ("c_attn",), ("c_proj", "c_fc")])
def gpt2(request) -> GPT2:
    model = sharp(GPT2(small_gpt2(n_layers=1)))
    add_lora(model, request.param, rank=4, alpha=8, dropout=0.0)
    for name, p in mark_only_lora_as_trainable(model).named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, 0, 0.1)
    return model


def test_merged_slices_and_whole_fused_layers_equal_unmerged_ones(gpt2):
    gpt2.double()
    tokens = torch.randint(0, 2048, (2, 20))
    unmerged, merged = gpt2.train()(tokens), gpt2.eval()(tokens)
    torch.testing.assert_close(merged, unmerged, atol=1e-10, rtol=0)


def test_slices_train_and_come_back_bit_identical(gpt2):
    frozen = {n: p.detach().clone() for n, p in gpt2.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in gpt2.parameters() if p.requires_grad], 0.1)
    tokens = torch.randint(0, 2048, (2, 12))
    for _ in range(20):
        gpt2.eval()
        gpt2.train()(tokens).pow(2).mean().backward()
        assert all(p.grad.any() for p in gpt2.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    state = gpt2.eval().state_dict()
    assert all(torch.equal(state[name], before) for name, before in frozen.items())


def test_a_slice_changes_its_own_rows_alone():
    model = sharp(GPT2(small_gpt2()))
    add_lora(model, ("h.0.attn.c_attn.k",), rank=2, alpha=4)
    layer = model.h[0].attn.c_attn
    nn.init.normal_(layer.lora_B)
    changed = layer.delta().abs().sum(1) > 0
    assert changed.tolist() == [False] * 32 + [True] * 32 + [False] * 32
    assert not isinstance(model.h[1].attn.c_attn, LoRALinear)


def test_slices_equal_separate_adapters_on_separate_projections():
    """q and v of the fused layer against two plain LoRA layers with the same numbers."""
    model = sharp(GPT2(small_gpt2(n_layers=1))).double()
    fused = model.h[0].attn.c_attn
    rows = {part: slice(32 * i, 32 * (i + 1)) for i, part in enumerate(fused.parts)}
    apart = {part: LoRALinear.from_linear(nn.Linear(32, 32).double(), 4, 8) for part in ("q", "v")}
    add_lora(model, ("q", "v"), rank=4, alpha=8, dropout=0.0)
    layer = model.h[0].attn.c_attn
    with torch.no_grad():
        nn.init.normal_(layer.lora_B)
        for i, (part, other) in enumerate(apart.items()):
            other.weight.copy_(fused.weight[rows[part]])
            other.bias.copy_(fused.bias[rows[part]])
            other.lora_A.copy_(layer.lora_A.chunk(2)[i])
            other.lora_B.copy_(layer.lora_B.chunk(2)[i])
    x = torch.randn(3, 32, dtype=torch.float64)
    for part, other in apart.items():
        torch.testing.assert_close(layer(x)[:, rows[part]], other(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x)[:, rows["k"]], fused(x)[:, rows["k"]], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("preset", "targets", "rank", "count", "share"),
    [("gpt2", ("c_attn",), 16, 589_824, 0.47), ("gpt2-medium", ("c_attn",), 128, 12_582_912, 3.42),
     ("gpt2-medium", ("c_attn", "attn.c_proj"), 128, 18_874_368, 5.05),
     ("gpt2-medium", ("q", "k", "v", "attn.c_proj"), 16, 3_145_728, 0.88),
     ("gpt2", ("q", "k", "v"), 16, 884_736, 0.71)],
)  # fmt: skip
def test_trainable_parameters_are_the_courses_figures(preset, targets, rank, count, share):
    with torch.device("meta"):
        model = GPT2(GPT2Config.preset(preset))
    base = sum(p.numel() for p in model.parameters())
    add_lora(model, targets, rank, 2 * rank)
    mark_only_lora_as_trainable(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == count
    assert round(100 * trainable / (base + trainable), 2) == share


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [(("q", "c_attn"), 4, "whole and in slices"), (("q",), 33, "between 1 and 32"),
     (("x",), 4, "there are c_attn"), (("wte",), 4, "not a linear layer")],
)  # fmt: skip
def test_impossible_targets_of_a_fused_layer_change_nothing(targets, rank, message):
    model = sharp(GPT2(small_gpt2()))
    with pytest.raises(UserError, match=message):
        add_lora(model, targets, rank)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_a_slice_is_not_adapted_twice():
    model = sharp(GPT2(small_gpt2()))
    add_lora(model, ("q",), 4)
    for targets in (("q",), ("v",), ("c_attn",)):
        with pytest.raises(UserError, match="LoRA already"):
            add_lora(model, targets, 4)


def test_folded_slices_give_the_same_logits(gpt2):
    tokens = torch.randint(0, 2048, (2, 12))
    want = gpt2.eval()(tokens)
    fold_lora(gpt2)
    assert torch.equal(gpt2(tokens), want)
    assert gpt2.h[0].attn.c_attn.parts == ("q", "k", "v")


def test_what_merging_in_16_bits_loses_is_told(model):
    """A planted update below bf16's resolution: all of it is lost; in fp32 next to nothing."""
    for name, p in model.named_parameters():
        if name.endswith(("wq.weight", "wv.weight")):
            p.data.fill_(1.0)
        elif name.endswith("lora_A"):
            p.data.fill_(1e-4)
        elif name.endswith("lora_B"):
            p.data.fill_(1e-2)
    assert lost_in_merging(model) < 0.1
    assert lost_in_merging(model.to(torch.bfloat16)) == pytest.approx(1.0, abs=0.01)


def test_merging_under_autocast_is_merging_in_fp32(model):
    layer, update = model.layers[0].attention.wq, model.layers[0].attention.wq.delta()
    with torch.autocast("cpu", torch.bfloat16):
        merged = layer.eval().weight.detach().clone()
    assert torch.equal(merged, layer.train().weight + update)


def test_a_layer_that_is_more_than_linear_is_refused_not_replaced():
    model = Llama(small_config())
    add_adapters(model, ("feed_forward.w2",), 4)
    with pytest.raises(UserError, match="AdapterLinear"):
        add_lora(model, ("w2",), rank=2)


def test_the_arguments_come_in_the_order_that_is_promised():
    layer = LoRALinear(8, 6, True, 2, 4.0, 0.1)
    assert (len(layer.lora_A), layer.lora_scaling, layer.lora_dropout.p) == (2, 2.0, 0.1)


def test_an_error_while_evaluating_puts_the_mode_back(model):
    model.train()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_to_measure_what_merging_loses_leaves_the_mode(model, mode):
    lost_in_merging(model.train(mode))
    assert all(module.training is mode for module in model.modules())
    assert model.layers[0].attention.wq.has_weights_merged is not mode


def test_slices_are_kept_in_the_layers_order_and_mode():
    fused = GPT2(small_gpt2()).h[0].attn.c_attn
    for mode in (True, False):
        layer = LoRAParts.from_fused(fused.train(mode), ["v", "q"], 4, 8, 0.5)
        assert layer.adapted_parts == ["q", "v"] and layer.training is mode
        assert layer.lora_dropout.training is mode


def trained(layer):
    torch.optim.SGD([layer.weight], 1.0).step()


def written_to(layer):
    with torch.no_grad():
        layer.weight.add_(1.0)


def replaced(layer):
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))


@pytest.mark.parametrize("change", [trained, written_to, replaced])
def test_what_is_written_into_a_merged_weight_is_not_lost_without_a_word(change):
    layer = LoRALinear(6, 4, lora_rank=2).eval()
    layer.weight.grad = torch.ones_like(layer.weight)
    change(layer)
    with pytest.raises(UserError, match="call train"):
        layer.train()


@pytest.mark.parametrize("copy", [
    copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), lambda layer: layer.double(),
    lambda layer: layer.requires_grad_(False),
], ids=["deepcopy", "pickle", "double", "frozen"])  # fmt: skip
def test_a_copied_moved_or_frozen_merged_layer_can_be_unmerged(copy):
    layer = LoRALinear(6, 4, lora_rank=2)
    nn.init.normal_(layer.lora_B)
    before = layer.weight.clone()
    again = copy(layer.eval()).train()
    assert torch.equal(again.weight.float(), before)


def test_a_layer_made_in_inference_mode_merges_and_unmerges():
    with torch.inference_mode():
        layer = LoRALinear(6, 4, lora_rank=2)
        before = layer.weight.clone()
    assert torch.equal(layer.eval().train().weight, before)


def test_a_layer_on_no_device_merges_and_unmerges():
    layer = LoRALinear(6, 4, lora_rank=2, device="meta")
    assert layer.eval().has_weights_merged and layer.train().weight.is_meta
