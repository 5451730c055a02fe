"""Adapters: PEFT loads ours, we load PEFT's, and a wrong base is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gpt2 import GPT2, load_gpt2, save_gpt2
from llama import Llama, load_llama, save_llama
from minillm import add_lora, lora_state_dict, mark_only_lora_as_trainable
from minillm.adapt.lora import lora_layers
from minillm.adapt.methods import MethodOptions, adapt
from minillm.adapt.prompts import SoftPrompt
from minillm.errors import UserError
from minillm.peft_format import load_adapter, read_notes, save_adapter
from tests.conftest import sharp, small_config, small_gpt2

ALL = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def adapted(model: Llama, targets=("wq", "wk", "wv")) -> Llama:
    add_lora(model, targets, rank=4, alpha=8, dropout=0.1)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, 0, 0.1)
    return model


@pytest.fixture
def base(tokenizer, tmp_path, config):
    save_llama(sharp(Llama(config)), tokenizer, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("targets", [("wq", "wv"), ALL, ("layers.1.attention.wk",)])
def test_peft_loads_ours_with_equal_logits(base, tmp_path, targets):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = adapted(load_llama(base)[0], targets)
    save_adapter(model, tmp_path / "adapter", str(base))
    peer = transformers.AutoModelForCausalLM.from_pretrained(base)
    plain = peer(tokens := torch.randint(0, 2048, (2, 48))).logits
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    got, want = peer(tokens).logits, model.eval()(tokens)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
    assert (got - plain).abs().max() > 0.01


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_we_load_pefts_with_equal_logits(base, tmp_path, targets):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    peer = peft.get_peft_model(peer, settings).eval()
    for name, p in peer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, 0, 0.1)
    peer.save_pretrained(tmp_path / "adapter")
    model = load_llama(base)[0].eval()
    load_adapter(model, tmp_path / "adapter")  # no fingerprint: taken on trust
    tokens = torch.randint(0, 2048, (2, 48))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=2e-4, rtol=0)


def test_save_and_load_round_trip_is_bit_exact_merged_or_not(base, tmp_path):
    model = adapted(load_llama(base)[0])
    for mode in (True, False):
        save_adapter(model.train(mode), tmp_path / "adapter", template={"name": "x"})
        again = load_llama(base)[0]
        assert load_adapter(again, tmp_path / "adapter") is again
        assert read_notes(tmp_path / "adapter")["template"] == {"name": "x"}
        want, got = lora_state_dict(model), lora_state_dict(again)
        assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
def test_the_base_is_known_again_in_another_dtype(base, tmp_path, trained, loaded):
    """fp16 stored, then bf16 held, is rounded twice and truly another base: left out here."""
    if (trained, loaded) == (torch.float16, torch.bfloat16):
        trained = torch.float32
    save_adapter(adapted(load_llama(base, dtype=trained)[0]), tmp_path / "adapter")
    model = load_llama(base, dtype=loaded)[0]
    load_adapter(model, tmp_path / "adapter")
    assert lora_state_dict(model)


@pytest.mark.parametrize("change", ["one weight", "two rows swapped", "one layer less"])
def test_a_wrong_base_is_refused_unless_forced(base, tmp_path, change):
    targets = ("layers.0.attention.wq",)
    save_adapter(adapted(load_llama(base)[0], targets), tmp_path / "adapter")
    wrong = load_llama(base, n_layers=1 if change == "one layer less" else 2)[0]
    with torch.no_grad():
        weight = wrong.layers[0].feed_forward.w2.weight
        if change == "one weight":
            weight[3, 3] += 0.1
        elif change == "two rows swapped":
            weight[[0, 1]] = weight[[1, 0]].clone()
    with pytest.raises(UserError, match="another base"):
        load_adapter(wrong, tmp_path / "adapter")
    load_adapter(wrong, tmp_path / "adapter", force=True)


@pytest.mark.parametrize("change", [
    {"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]},
    {"rank_pattern": {"q_proj": 2}}, {"peft_type": "IA3"}, {"r": None},
    {"init_lora_weights": "pissa"}, {"r": 8.5}, {"lora_dropout": 7}, {"lora_alpha": "x"},
    {"alpha_pattern": {"q_proj": 1}}, {"lora_bias": True},
])  # fmt: skip
def test_settings_that_mean_something_else_are_refused_by_name(base, tmp_path, change):
    save_adapter(adapted(load_llama(base)[0]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=next(iter(change))):
        load_adapter(load_llama(base)[0], tmp_path)


def test_an_adapter_of_another_size_is_refused(base, tmp_path, tokenizer):
    other = adapted(Llama(small_config(dim=64)))
    save_adapter(other, tmp_path / "adapter")
    (tmp_path / "adapter" / "minillm.json").unlink()
    with pytest.raises(UserError, match="misshapen"):
        load_adapter(load_llama(base)[0], tmp_path / "adapter")


def test_a_refused_adapter_leaves_the_model_plain(base, tmp_path):
    save_adapter(adapted(load_llama(base)[0]), tmp_path)
    path = tmp_path / "adapter_config.json"
    good = path.read_text()
    path.write_text(good.replace('"r": 4', '"r": 5'))
    model = load_llama(base)[0]
    with pytest.raises(UserError, match="misshapen"):
        load_adapter(model, tmp_path)
    path.write_text(good)
    load_adapter(model, tmp_path)


@pytest.mark.parametrize("notes", ["[]", '{"base_fingerprint": "abc"}', "{"])
def test_damaged_notes_are_named(base, tmp_path, notes):
    save_adapter(adapted(load_llama(base)[0]), tmp_path)
    (tmp_path / "minillm.json").write_text(notes)
    with pytest.raises(UserError, match="minillm.json"):
        load_adapter(load_llama(base)[0], tmp_path)


def test_a_damaged_adapter_is_named(base, tmp_path):
    save_adapter(adapted(load_llama(base)[0]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match="adapter_model.safetensors"):
        load_adapter(load_llama(base)[0], tmp_path)


def test_a_model_without_lora_saves_no_adapter(tmp_path):
    with pytest.raises(UserError, match="no LoRA"):
        save_adapter(Llama(small_config()), tmp_path)


GPT2_TARGETS = [("c_attn",), ("q", "v"), ("q", "k", "v"), ("c_attn", "c_proj", "c_fc"),
                ("h.1.attn.c_attn.v",), ("attn.c_proj",), ("q", "v", "c_proj")]  # fmt: skip


@pytest.fixture
def gpt2_base(bpe, tmp_path):
    from gpt2 import GPT2, save_gpt2

    save_gpt2(sharp(GPT2(small_gpt2(vocab_size=300))), bpe, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("targets", GPT2_TARGETS)
def test_peft_loads_our_gpt2_adapters_with_equal_logits(gpt2_base, tmp_path, targets):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = adapted(load_gpt2(gpt2_base)[0], targets)
    save_adapter(model, tmp_path / "adapter", str(gpt2_base))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]
    peer = transformers.AutoModelForCausalLM.from_pretrained(gpt2_base).eval()
    plain = peer(tokens := torch.randint(0, 300, (2, 48))).logits
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    got, want = peer(tokens).logits, model.eval()(tokens)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
    assert (got - plain).abs().max() > 0.01


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj"], "all-linear"])
def test_we_load_pefts_gpt2_adapters_with_equal_logits(gpt2_base, tmp_path, targets):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(gpt2_base)
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    peer = peft.get_peft_model(peer, settings).eval()
    for name, p in peer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, 0, 0.1)
    peer.save_pretrained(tmp_path / "adapter")
    model = load_gpt2(gpt2_base)[0].eval()
    load_adapter(model, tmp_path / "adapter")
    tokens = torch.randint(0, 300, (2, 48))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("targets", GPT2_TARGETS)
def test_a_gpt2_adapter_comes_back_as_it_was_slices_included(gpt2_base, tmp_path, targets):
    model = adapted(load_gpt2(gpt2_base)[0], targets)
    save_adapter(model, tmp_path / "adapter", str(gpt2_base))
    again = load_gpt2(gpt2_base)[0]
    load_adapter(again, tmp_path / "adapter")
    before, after = lora_state_dict(model), lora_state_dict(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("parts", [{"h.0.attn.c_attn": ["x"]}, {"h.9": ["q"]}, ["q"], {"wte": []},
                                   {"h.0.attn.c_attn": ["q", "k", "v"]}])  # fmt: skip
def test_slices_that_do_not_fit_are_refused(gpt2_base, tmp_path, parts):
    save_adapter(adapted(load_gpt2(gpt2_base)[0], ("q", "v")), tmp_path / "adapter")
    notes = json.loads((tmp_path / "adapter" / "minillm.json").read_text())
    (tmp_path / "adapter" / "minillm.json").write_text(json.dumps(notes | {"parts": parts}))
    with pytest.raises(UserError, match="save"):
        load_adapter(load_gpt2(gpt2_base)[0], tmp_path / "adapter")


def test_what_the_files_would_leave_out_is_refused(base, tmp_path, tokenizer):
    model = mark_only_lora_as_trainable(adapted(load_llama(base)[0]))
    model.norm.weight.requires_grad = True
    with pytest.raises(UserError, match="LoRA and more"):
        save_adapter(model, tmp_path / "a")
    wrapped = SoftPrompt(adapted(load_llama(base)[0]), torch.randn(3, model.config.dim))
    with pytest.raises(UserError, match="LoRA and more"):
        save_adapter(wrapped, tmp_path / "a")
    wrapped = SoftPrompt(load_llama(base)[0].requires_grad_(True), torch.randn(3, 32))
    with pytest.raises(UserError, match="the base under the soft prompt or prefix is trainable"):
        save_adapter(wrapped, tmp_path / "a")
    model = adapted(load_llama(base)[0])
    next(iter(lora_layers(model).values())).enabled = False
    with pytest.raises(UserError, match="switched off"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_adapter_of_pefts_on_the_head_loads(base, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    peer = peft.get_peft_model(peer, settings).eval()
    for name, p in peer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, 0, 0.1)
    peer.save_pretrained(tmp_path / "adapter")  # with the head itself
    model = load_llama(base)[0].eval()
    load_adapter(model, tmp_path / "adapter")
    tokens = torch.randint(0, 2048, (2, 48))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=2e-4, rtol=0)
    load_adapter(load_llama(base, dtype=torch.bfloat16)[0], tmp_path / "adapter")
    peer.base_model.model.lm_head.base_layer.weight.data.mul_(1.1)
    peer.save_pretrained(tmp_path / "adapter")  # with a head that is another
    with pytest.raises(UserError, match=r"lm_head\.base_layer\.weight is not this base's"):
        load_adapter(load_llama(base)[0], tmp_path / "adapter")


def test_lora_on_a_head_that_is_the_embedding_is_refused_for_what_it_is(bpe, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    save_gpt2(GPT2(small_gpt2(vocab_size=300)), bpe, tmp_path / "base")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    peft.get_peft_model(peer, settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="such as a head that is its embedding"):
        load_adapter(load_gpt2(tmp_path / "base")[0], tmp_path / "adapter")


def test_a_refused_adapter_leaves_the_model_as_it_was(base, tmp_path):
    save_adapter(adapted(load_llama(base)[0], ("wq", "wv")), tmp_path / "a")
    save_adapter(adapted(load_llama(base)[0], ("wk", "wq")), tmp_path / "b")
    model = load_adapter(load_llama(base)[0], tmp_path / "a").eval()
    tokens = torch.randint(0, 2048, (2, 20))
    before, layers = model(tokens), [*lora_layers(model)]
    with pytest.raises(UserError, match="adapter_model.safetensors: .* has LoRA already"):
        load_adapter(model, tmp_path / "b")
    assert torch.equal(model(tokens), before) and [*lora_layers(model)] == layers


def test_a_rank_above_a_layers_smaller_side_is_refused_as_not_supported(base, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=40, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(peer, settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="rank 40 on .*wq, whose smaller side is 32; not supported"):
        load_adapter(load_llama(base)[0], tmp_path / "adapter")


@pytest.mark.parametrize("key", ["lm_head.weight", "model.embed_tokens.lora_embedding_A"])
def test_more_than_lora_on_linear_layers_is_refused_by_name(base, tmp_path, key):
    save_adapter(adapted(load_llama(base)[0]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{key}": torch.zeros(2, 2)}, file)
    with pytest.raises(UserError, match="more than LoRA on linear layers"):
        load_adapter(load_llama(base)[0], tmp_path)


@pytest.mark.parametrize("has_notes", [True, False])
def test_lora_that_a_file_lost_is_missed(base, tmp_path, has_notes):
    """Also in PEFT's own file, by what its config says of it."""
    save_adapter(adapted(load_llama(base)[0]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.1." not in k}, file)
    if not has_notes:
        (tmp_path / "minillm.json").unlink()
    model = load_llama(base)[0]
    told = "lacks .*layers.1.*which minillm.json lists" if has_notes else "nothing for layers.1"
    with pytest.raises(UserError, match=told):
        load_adapter(model, tmp_path)
    assert not lora_layers(model)


@pytest.mark.parametrize(("change", "is_whole"), [
    ({}, False), ({"layers_to_transform": 0}, True), ({"layers_to_transform": [0]}, True),
    ({"exclude_modules": ["model.layers.1.self_attn.q_proj"]}, True),
    ({"layers_to_transform": None, "exclude_modules": []}, False),
    ({"target_modules": ["0.self_attn.q_proj"]}, True), ({"target_modules": ".*q_proj"}, True),
])  # fmt: skip
def test_what_pefts_file_must_hold_is_what_its_config_narrows_down(
    change, is_whole, tokenizer, tmp_path
):
    save_llama(sharp(Llama(small_config(n_layers=11))), tokenizer, tmp_path / "base")
    model = adapted(load_llama(tmp_path / "base")[0], ("layers.0.attention.wq",))
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "minillm.json").unlink()
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"target_modules": ["q_proj"]}
    path.write_text(json.dumps(config | change))
    plain = load_llama(tmp_path / "base")[0]
    if is_whole:
        load_adapter(plain, tmp_path / "adapter")
    else:
        with pytest.raises(UserError, match=r"nothing for layers\.1\."):
            load_adapter(plain, tmp_path / "adapter")


@pytest.mark.parametrize(("method", "lost", "has_notes"), [
    ("adapters", "down.weight", True), ("adapters", "up.bias", False), ("bitfit", "wq.bias", True),
])  # fmt: skip
def test_a_tensor_that_a_file_lost_is_missed(base, tmp_path, tokenizer, method, lost, has_notes):
    model, _ = adapt(load_llama(base)[0], tokenizer, method, MethodOptions(add_biases=True))
    save_adapter(model, tmp_path, method=method)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(lost))
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    if not has_notes:
        (tmp_path / "minillm.json").unlink()
    with pytest.raises(UserError, match=name):
        load_adapter(load_llama(base)[0], tmp_path)


def test_lora_under_two_names_is_refused(base, tmp_path):
    save_adapter(adapted(load_llama(base)[0]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file(tensors | {key.removeprefix("base_model.model."): tensors[key] + 1}, file)
    with pytest.raises(UserError, match="a second time"):
        load_adapter(load_llama(base)[0], tmp_path)


def test_numbers_that_cannot_be_leave_the_model_plain(base, tmp_path):
    save_adapter(adapted(load_llama(base)[0]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[[name for name in tensors if "layers.1." in name][-1]][0, 0] = torch.nan
    save_file(tensors, file)
    model = load_llama(base)[0]
    with pytest.raises(UserError, match="NaN"):
        load_adapter(model, tmp_path)
    assert not lora_layers(model)


@pytest.mark.parametrize("rank", [1, 9])
def test_ranks_that_the_file_does_not_have_are_refused(base, tmp_path, rank):
    save_adapter(with_ranks_4_and_2(load_llama(base)[0], 4), tmp_path)
    notes = json.loads((tmp_path / "minillm.json").read_text())
    notes["ranks"] = dict.fromkeys(notes["ranks"], rank)
    (tmp_path / "minillm.json").write_text(json.dumps(notes))
    with pytest.raises(UserError, match=r"minillm\.json"):
        load_adapter(load_llama(base)[0], tmp_path)


def test_a_rank_above_the_matrix_is_told_with_the_file(base, tmp_path):
    save_adapter(adapted(load_llama(base)[0], ("wk",)), tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    wide = {name: torch.cat([t] * 50, int("lora_B" in name)) for name, t in load_file(file).items()}
    save_file(wide, file)
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"r": 50 * settings["r"]}))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: .* rank"):
        load_adapter(load_llama(base)[0], tmp_path)


@pytest.mark.parametrize("alpha", [-7, 0])
def test_an_alpha_that_would_not_be_read_back_is_not_saved(alpha, base, tmp_path):
    model = load_llama(base)[0]
    add_lora(model, ("wq",), rank=4, alpha=alpha)
    with pytest.raises(UserError, match="alpha"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("rank", "alpha"), [(6, 7), (5, 3.3), (25, 7)])
def test_rsloras_scale_is_read_back_to_the_bit(rank, alpha, base, tmp_path):
    model, other = load_llama(base)[0], load_llama(base)[0]
    options = MethodOptions(targets=("wq",), rank=rank, alpha=alpha, rslora=True)
    adapt(model, None, "lora", options)
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    scales = [m.layers[0].attention.wq.lora_scaling for m in (model, other)]
    assert scales[0] == scales[1] == alpha * rank**0.5 / rank


def test_alpha_is_written_as_it_was_given(base, tmp_path):
    model = load_llama(base)[0]
    add_lora(model, ("wq",), rank=25, alpha=7)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 7.0


def with_ranks_4_and_2(model: Llama, alpha: float) -> Llama:
    """LoRA of rank 4 and alpha 8 on wq, of rank 2 and this alpha on wv."""
    add_lora(model, ("wq",), 4, 8, 0.0)
    add_lora(model, ("wv",), 2, alpha, 0.0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, 0, 0.1)
    return model


def test_layers_of_two_ranks_come_back_with_their_scale(base, tmp_path):
    tuned, tokens = with_ranks_4_and_2(load_llama(base)[0], 4), torch.randint(0, 2048, (1, 9))
    save_adapter(tuned, tmp_path / "a")
    again = load_adapter(load_llama(base)[0], tmp_path / "a")
    torch.testing.assert_close(again(tokens), tuned(tokens))


def test_layers_of_two_scales_are_refused(base, tmp_path):
    with pytest.raises(UserError, match="differ in scale"):
        save_adapter(with_ranks_4_and_2(load_llama(base)[0], 8), tmp_path / "a")


def test_peft_is_told_the_adapted_layers_and_no_others(base, tmp_path):
    save_adapter(adapted(load_llama(base)[0], ("layers.0.attention.wq",)), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]


def test_tensors_of_another_shape_are_refused_though_they_have_as_many_numbers(bpe, tmp_path):
    model = sharp(GPT2(small_gpt2(vocab_size=300)))
    save_gpt2(model, bpe, tmp_path / "base")
    model.requires_grad_(False)
    model.h[1].requires_grad_(True)
    save_adapter(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    name = "h.1.mlp.c_fc.weight"
    state = load_file(file)
    save_file(state | {name: state[name].t().contiguous()}, file)
    with pytest.raises(UserError, match=rf"misshapen: {name}"):
        load_adapter(load_gpt2(tmp_path / "base")[0], tmp_path / "a")


def test_an_adapter_without_weights_misses_the_file_that_is_written_today(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="adapter_model.safetensors: no such file"):
        load_adapter(Llama(small_config()), tmp_path)
