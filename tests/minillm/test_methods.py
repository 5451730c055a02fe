"""Every method on both models: what it trains, what it leaves alone, how it is stored."""

from dataclasses import replace

import pytest
import torch

from gpt2 import GPT2, GPT2Config
from llama import Llama
from minillm import add_lora, generate
from minillm.adapt.bottleneck import AdapterLinear, add_adapters
from minillm.adapt.methods import METHODS, MethodOptions, adapt
from minillm.adapt.prompts import PrefixTuning, SoftPrompt, prefix_of_text
from minillm.checkpoint import empty_model
from minillm.cli import Parser
from minillm.data.batches import Row, collate
from minillm.errors import UserError
from minillm.flags import add_flags, parse
from minillm.linear import Linear
from minillm.losses import token_loss
from minillm.peft_format import load_adapter, read_notes, save_adapter
from minillm.progress import load_trainable, trainable_state
from tests.conftest import MODELS, equal_states, sharp, small_config, small_gpt2

OPTIONS = MethodOptions(rank=4, lora_dropout=0.0, bottleneck=6, virtual_tokens=5, add_biases=True)
TARGETS = {
    "llama-mha": ("wq", "wv"), "llama-gqa": ("wq", "wv"), "gpt2": ("c_attn",),
    "phi": ("q_proj", "v_proj"),
}  # fmt: skip
CASES = {
    **{name: (name, {}) for name in METHODS},
    "untied": ("last_layer", {"untie": True}),
    "prefix_mlp": ("prefix_tuning", {"prefix_hidden": 8}),
    "random_prompt": ("prompt_tuning", {"prompt_text": ""}),
    "random_prefix": ("prefix_tuning", {"prompt_text": ""}),
}
ALONE = [case for case in CASES if case != "full"]


def build(kind: str, case: str, tokenizer, dtype=torch.float32):
    """A random model adapted in this way, and the same model as it was."""
    method, changes = CASES[case]
    tied = {"tied_head": True} if changes.get("untie") else {}
    torch.default_generator.manual_seed(3)
    model = MODELS[kind](**tied).to(dtype)
    plain = MODELS[kind](**tied).to(dtype)
    plain.load_state_dict(model.state_dict())
    options = replace(OPTIONS, targets=TARGETS[kind], **changes)
    # biases are added to LLaMA alone; to GPT-2 there are none to add
    return adapt(model, tokenizer, method, options)[0], plain


def trained(model, steps: int = 20):
    """The model after some steps of AdamW on random tokens, and the optimizer's losses."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    batch = random_batch()
    for _ in range(steps):
        loss, count = token_loss(model.train(), batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def random_batch(rows: int = 3, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    lengths = [12, 7, 9][:rows]
    tokens = [torch.randint(3, 2048, (n,), generator=generator) for n in lengths]
    return collate([Row(t, t.clone()) for t in tokens], 0)


both = pytest.mark.parametrize("kind", ["llama-gqa", "gpt2", "phi"])
all_cases = pytest.mark.parametrize("case", CASES)
alone = pytest.mark.parametrize("case", ALONE)


@both
@all_cases
def test_frozen_tensors_do_not_move_and_trained_ones_do(kind, case, tokenizer):
    model, _ = build(kind, case, tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


@both
@all_cases
def test_after_an_evaluation_every_trained_tensor_gets_a_gradient(kind, case, tokenizer):
    model = trained(build(kind, case, tokenizer)[0], steps=2)
    model.eval()(random_batch().tokens)
    loss, _ = token_loss(model.train(), random_batch())
    loss.backward()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None, name
        elif "tok_emb" not in name and "wte" not in name and "wpe" not in name:
            assert p.grad.abs().max() > 0, name


@both
@pytest.mark.parametrize("case", ["lora", "adapters", "full", "bitfit", "last_layer", "untied"])
def test_it_starts_as_the_model_it_adapts(kind, case, tokenizer):
    model, plain = build(kind, case, tokenizer)
    tokens = random_batch().tokens
    assert torch.equal(model.eval()(tokens), plain.eval()(tokens))


@both
@pytest.mark.parametrize("case", ["prompt_tuning", "prefix_tuning", "prefix_mlp"])
def test_virtual_tokens_start_as_the_words_they_are_made_of(kind, case, tokenizer):
    model, plain = build(kind, case, tokenizer, torch.float64)
    ids = tokenizer.encode(OPTIONS.prompt_text)
    words = torch.tensor([[ids[i % len(ids)] for i in range(5)]])
    tokens = random_batch().tokens
    joined = torch.cat((words.expand(len(tokens), -1), tokens), 1)
    with torch.no_grad():
        got, want = model.eval()(tokens), plain.eval()(joined)[:, 5:]
    # the trained columns are kept in fp32
    assert torch.allclose(got, want, atol=1e-3 if "prefix" in case else 1e-4)


@both
@all_cases
def test_training_changes_what_it_says(kind, case, tokenizer):
    model, _ = build(kind, case, tokenizer)
    tokens = random_batch().tokens
    before = model.eval()(tokens)
    assert not torch.allclose(before, trained(model).eval()(tokens), atol=1e-3)


@both
@all_cases
def test_generation_with_cache_is_generation_without(kind, case, tokenizer):
    model = trained(build(kind, case, tokenizer, torch.float32)[0], steps=3).double()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    cached = generate(model, prompts, 8)
    assert cached == generate(model, prompts, 8, use_cache=False)
    assert cached == [generate(model, [prompt], 8)[0] for prompt in prompts]


@both
@all_cases
def test_cached_logits_are_those_of_the_whole_text(kind, case, tokenizer):
    model = trained(build(kind, case, tokenizer)[0], steps=3).double().eval()
    tokens = random_batch().tokens
    cache = model.new_cache(len(tokens), tokens.size(1))
    with torch.no_grad():
        pieces = [model(tokens[:, :4], cache), model(tokens[:, 4:5], cache),
                  model(tokens[:, 5:], cache)]  # fmt: skip
        assert torch.allclose(torch.cat(pieces, 1), model(tokens), atol=1e-10)


@both
@all_cases
def test_a_padded_row_is_the_row_alone(kind, case, tokenizer):
    model = trained(build(kind, case, tokenizer)[0], steps=3).double().eval()
    row = random_batch(1).tokens
    padded = torch.cat((torch.zeros(1, 6, dtype=torch.int64), row), 1)
    with torch.no_grad():
        got = model(padded, left_pad=torch.tensor([6]))[:, 6:]
        assert torch.allclose(got, model(row), atol=1e-10)


@both
@all_cases
def test_paddings_on_the_right_change_no_loss(kind, case, tokenizer):
    model = trained(build(kind, case, tokenizer)[0], steps=3).double().eval()
    together, count = token_loss(model, random_batch())
    rows = [Row(t[:n], labels[:n]) for t, labels, n in zip(*random_batch(), strict=True)]
    apart = [token_loss(model, collate([row], 0)) for row in rows]
    assert count == sum(n for _, n in apart)
    assert torch.allclose(together, sum(loss for loss, _ in apart), atol=1e-9)


@both
@all_cases
def test_a_checkpointed_step_has_the_gradients_of_a_plain_one(kind, case, tokenizer):
    model = trained(build(kind, case, tokenizer)[0], steps=2)
    grads = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        token_loss(model.train(), random_batch())[0].backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@both
@all_cases
def test_16_bit_autocast_trains_it(kind, case, tokenizer):
    method = METHODS[CASES[case][0]]
    model, _ = build(kind, case, tokenizer, torch.float32 if method.in_place else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = token_loss(model.train(), random_batch())
    loss.backward()
    kept = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad is not None for p in kept)


@pytest.mark.parametrize("kind", [*MODELS])
@alone
def test_saved_alone_and_put_on_a_fresh_base_it_is_the_same(kind, case, tokenizer, tmp_path):
    model, plain = build(kind, case, tokenizer)
    trained(model, steps=3)
    save_adapter(model, tmp_path, "base", {"name": "x"}, CASES[case][0])
    again = load_adapter(plain, tmp_path).eval()
    assert not any(p.requires_grad for p in again.parameters())
    tokens = random_batch().tokens
    assert torch.equal(again(tokens), model.eval()(tokens))
    assert read_notes(tmp_path)["method"] == CASES[case][0]


@both
@alone
def test_it_is_refused_on_another_base(kind, case, tokenizer, tmp_path):
    model, plain = build(kind, case, tokenizer)
    save_adapter(trained(model, 1), tmp_path)
    with torch.no_grad():
        plain.blocks[0].get_submodule(plain.BRANCH_ENDS[0]).weight.mul_(2)
    with pytest.raises(UserError, match="another base"):
        load_adapter(plain, tmp_path)


@pytest.mark.parametrize("case", ALONE)
def test_it_is_refused_on_a_model_of_another_size(case, tokenizer, tmp_path):
    save_adapter(build("gpt2", case, tokenizer)[0], tmp_path)
    (tmp_path / "minillm.json").unlink()
    other = sharp(GPT2(small_gpt2(dim=64, n_heads=2, tied_head="untied" not in case)))
    with pytest.raises(UserError):
        load_adapter(other, tmp_path)


@both
def test_paths_of_peft_and_ours_agree_on_a_soft_prompt(kind, tokenizer, tmp_path):
    agree_with_peft(kind, "prompt_tuning", tokenizer, tmp_path)


@pytest.mark.parametrize("kind", [*MODELS])
def test_paths_of_peft_and_ours_agree_on_a_prefix(kind, tokenizer, tmp_path):
    agree_with_peft(kind, "prefix_tuning", tokenizer, tmp_path)


def agree_with_peft(kind, case, tokenizer, folder):
    """PEFT loads what we save and gives the same logits; we load what PEFT saves again."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, plain = build(kind, case, tokenizer)
    from gpt2 import GPT2Tokenizer, save_gpt2
    from llama import save_llama
    from phi import PhiTokenizer, save_phi

    if kind == "gpt2":
        save_gpt2(plain, GPT2Tokenizer(None), folder / "base")
    elif kind == "phi":
        save_phi(plain, PhiTokenizer(None), folder / "base")
    else:
        save_llama(plain, tokenizer, folder / "base")
    save_adapter(trained(model, 3), folder / "ours")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    peer = peft.PeftModel.from_pretrained(base, folder / "ours").eval()
    tokens = torch.randint(3, 2048, (2, 48))
    with torch.no_grad():
        want = peer(tokens, attention_mask=torch.ones_like(tokens)).logits
        if case == "prompt_tuning":
            want = want[:, OPTIONS.virtual_tokens :]
        torch.testing.assert_close(model.eval()(tokens), want, atol=2e-4, rtol=0)
    peer.save_pretrained(folder / "theirs")
    again = load_adapter(plain, folder / "theirs")
    assert equal_states(again, model) or torch.equal(again.eval()(tokens), model(tokens))


SMALL = GPT2Config.preset("gpt2")


@pytest.mark.parametrize(("method", "options", "count"), [
    ("prompt_tuning", {"virtual_tokens": 6}, 4_608),
    ("prompt_tuning", {"virtual_tokens": 20}, 15_360),
    ("lora", {"rank": 8, "targets": ("c_attn",)}, 294_912),
    ("lora", {"rank": 16, "targets": ("q", "k", "v")}, 884_736),
    ("last_layer", {}, 38_597_376), ("last_block", {}, 7_087_872),
    ("last_layer", {"untie": True}, 38_597_376),
    ("adapters", {"bottleneck": 64}, 24 * (2 * 768 * 64 + 768 + 64)),
    ("bitfit", {}, 12 * (3 * 768 + 768 + 4 * 768 + 768 + 2 * 768) + 768),
])  # fmt: skip
def test_the_courses_parameter_counts_at_gpt2s_size(method, options, count, bpe):
    model = empty_model(lambda: GPT2(SMALL))
    adapted, line = adapt(model, bpe, method, MethodOptions(**options))
    found = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert found == count and f"{count:,}" in line
    assert "tied head" in line or method != "last_layer"


@both
def test_the_formula_names_the_trainable_count(kind, tokenizer):
    for case, (method, changes) in CASES.items():
        model = MODELS[kind](**({"tied_head": True} if changes.get("untie") else {}))
        options = replace(OPTIONS, targets=TARGETS[kind], **changes)
        adapted, line = adapt(model, tokenizer, method, options)
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert f"{count:,}" in line, case


def test_rslora_counts_alpha_over_the_root_of_the_rank(tokenizer):
    options = MethodOptions(targets=("wq",), rank=9, alpha=6, rslora=True)
    model, line = adapt(Llama(small_config()), tokenizer, "lora", options)
    assert model.layers[0].attention.wq.lora_scaling == pytest.approx(6 / 3)
    assert "alpha 6 x sqrt(rank) = 18 (scale 2)" in line


def test_the_last_layer_is_all_of_it_where_it_has_a_bias(bpe):
    model, line = adapt(MODELS["phi"](), bpe, "last_layer", MethodOptions())
    assert model.lm_head.bias.requires_grad and model.lm_head.weight.requires_grad
    assert "V D + V" in line


def test_there_is_nothing_to_untie_where_nothing_is_tied(tokenizer):
    with pytest.raises(UserError, match="not tied"):
        adapt(Llama(small_config()), tokenizer, "last_layer", MethodOptions(untie=True))


def test_bitfit_on_a_model_without_biases_says_so(tokenizer):
    with pytest.raises(UserError, match="--add-biases"):
        adapt(Llama(small_config()), tokenizer, "bitfit", MethodOptions())


def test_an_unknown_method_is_named(tokenizer):
    with pytest.raises(UserError, match="prefix_tuning"):
        adapt(Llama(small_config()), tokenizer, "magic", MethodOptions())


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_that_fill_the_context_are_refused(method, tokenizer):
    with pytest.raises(UserError, match="128"):
        adapt(Llama(small_config()), tokenizer, method, MethodOptions(virtual_tokens=127))


@pytest.mark.parametrize("first", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("second", ["prompt_tuning", "prefix_tuning"])
def test_a_second_soft_prompt_or_prefix_is_refused(first, second, tokenizer):
    options = MethodOptions(virtual_tokens=4)
    model, _ = adapt(Llama(small_config()), tokenizer, first, options)
    with pytest.raises(UserError, match="already; wrap the plain one"):
        adapt(model, tokenizer, second, options)


def test_every_row_of_a_soft_prompt_comes_from_its_own_token(bpe):
    model = sharp(GPT2(small_gpt2(vocab_size=bpe.vocab_size)))
    adapted, _ = adapt(model, bpe, "prompt_tuning", MethodOptions(virtual_tokens=6))
    ids = bpe.encode("[SUMMARIZE]")
    assert torch.equal(adapted.table[:6], model.wte.weight[(ids * 6)[:6]])
    assert len(set(ids[:6])) > 1


def test_a_prefix_changes_only_the_denominator():
    """Ratios between the text's own attention weights stay as they are without it."""
    from minillm.attention import causal_attention

    torch.manual_seed(0)
    q, k, past = (torch.randn(1, 1, n, 8, dtype=torch.float64) for n in (4, 4, 3))
    eye = torch.eye(7, dtype=torch.float64)[None, None]  # values that show the weights themselves
    mask = torch.ones(4, 7, dtype=torch.bool).tril(3)
    both = causal_attention(q, torch.cat((past, k), 2), eye, mask, "explicit")[0, 3, 3:]
    alone = causal_attention(q, k, eye[..., 3:, :], None, "explicit")[0, 3, 3:]
    assert torch.allclose(both / both.sum(), alone, atol=1e-12)


def test_an_adapters_bottleneck_is_a_branch_of_its_own(tokenizer):
    linear = torch.nn.Linear(8, 8)
    layer = AdapterLinear.from_linear(linear, 3)
    torch.nn.init.normal_(layer.up.weight)
    x = torch.randn(2, 8)
    h = linear(x)
    want = h + layer.up(torch.nn.functional.gelu(layer.down(h)))
    assert torch.allclose(layer(x), want)


@both
def test_prefix_of_text_is_the_cache_of_that_text(kind, tokenizer):
    model = MODELS[kind]().eval()
    columns = prefix_of_text(model, [5, 6, 7])
    tokens = random_batch().tokens
    words = torch.tensor([[5, 6, 7]]).expand(len(tokens), -1)
    want = model(torch.cat((words, tokens), 1))[:, 3:]
    assert torch.allclose(PrefixTuning(model, columns)(tokens), want, atol=1e-4)


@both
@pytest.mark.parametrize("case", ["prompt_tuning", "prefix_tuning"])
def test_a_cache_that_was_reset_still_begins_with_what_is_learned(kind, case, tokenizer):
    model = build(kind, case, tokenizer)[0].eval()
    tokens = random_batch().tokens
    cache = model.new_cache(len(tokens), tokens.size(1))
    with torch.no_grad():
        first = model(tokens, cache)
        cache.reset()
        assert torch.equal(model(tokens, cache), first)


@both
def test_a_soft_prompt_of_embeddings_is_those_tokens(kind):
    model = MODELS[kind]().eval()
    tokens = random_batch().tokens
    words = torch.tensor([[5, 6, 7]]).expand(len(tokens), -1)
    want = model(torch.cat((words, tokens), 1))[:, 3:]
    soft = SoftPrompt(model, model.embedding.weight[[5, 6, 7]])
    assert torch.allclose(soft(tokens), want, atol=1e-4)


@both
@alone
def test_what_a_checkpoint_keeps_makes_the_model_whatever_the_seed(kind, case, tokenizer):
    """Also what a method drew at the start and does not train."""
    model = trained(build(kind, case, tokenizer)[0], 3).eval()
    other = build(kind, case, tokenizer)[0]
    for name, buffer in other.named_buffers():
        if name in other.state_dict():
            buffer.add_(1.0)
    load_trainable(other, trainable_state(model))
    tokens = random_batch().tokens
    assert torch.equal(other.eval()(tokens), model(tokens))


@both
def test_gradients_reach_the_keys_and_the_values_of_a_prefix(kind):
    model, tokens = MODELS[kind]().requires_grad_(False), torch.randint(0, 2048, (2, 9))
    tuned = PrefixTuning(model, prefix_of_text(model, [1, 2, 3]))
    token_loss(tuned, (tokens, tokens))[0].backward()
    assert (tuned.columns.grad.abs().amax((0, 1, 3, 4)) > 0).tolist() == [True, True]


def test_a_given_soft_prompt_comes_after_the_trained_one():
    model, (trained, given) = MODELS["llama-gqa"](), torch.randn(2, 3, 32)
    tokens = torch.tensor([[5, 6]])
    want = model(tokens, prompt=torch.cat((trained, given)))
    torch.testing.assert_close(SoftPrompt(model, trained)(tokens, prompt=given), want)


def test_a_prefix_of_text_has_no_dropout():
    model = MODELS["gpt2"]()
    want = prefix_of_text(model.eval(), [1, 2, 3])
    model.train().dropout = 0.5
    assert torch.equal(prefix_of_text(model, [1, 2, 3]), want)


def test_an_adapter_begins_small_and_without_biases():
    layer = AdapterLinear.from_linear(Linear(400, 300), 50)
    assert float(layer.down.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not any(p.any() for p in (layer.down.bias, layer.up.weight, layer.up.bias))


@pytest.mark.parametrize("first", ["adapters", "lora"])
def test_adapters_go_on_plain_layers_alone(first):
    model = GPT2(small_gpt2())
    if first == "lora":
        add_lora(model, ("c_attn", "c_proj"), 4)
    else:
        add_adapters(model, model.BRANCH_ENDS, 4)
    with pytest.raises(UserError, match="add adapters to the plain model"):
        add_adapters(model, model.BRANCH_ENDS, 4)


class Watched(MethodOptions):
    """Options that remember which of them were read."""

    def __getattribute__(self, name: str):
        if name in MethodOptions.__dataclass_fields__:
            object.__getattribute__(self, "__dict__").setdefault("seen", set()).add(name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("name", [*METHODS])
def test_a_method_reads_the_options_it_names_and_no_others(name, tokenizer):
    options = Watched(targets=("wq",), add_biases=True)
    METHODS[name].adapt(MODELS["llama-gqa"](), tokenizer, options)
    assert vars(options).get("seen", set()) == {*METHODS[name].options}


@pytest.mark.parametrize(("method", "idle"), [
    ("bitfit", "--rank, --rslora, --virtual-tokens"),
    ("lora", "--virtual-tokens"),
    ("prompt_tuning", "--rank, --rslora, --weight-decay"),
])  # fmt: skip
@pytest.mark.parametrize("by_file", [False, True])
def test_flags_that_do_nothing_for_the_method_are_named(method, idle, by_file, tmp_path, capsys):
    parser, config = Parser(""), tmp_path / "run.json"
    add_flags(parser, "wq", 1e-5)
    given = ["--rank", "4", "--rslora", "--virtual-tokens", "4", "--weight-decay", "0.1"]
    config.write_text('{"rank": 4, "rslora": true, "virtual-tokens": 4, "weight-decay": 0.1}')
    parse(parser, ["--method", method, *(["--config", str(config)] if by_file else given)], 1e-5)
    assert capsys.readouterr().err == f"warning: {idle}: no effect on --method {method}\n"


def test_full_fine_tuning_spelt_as_rank_0_has_no_idle_rank(capsys):
    parser = Parser("")
    add_flags(parser, "wq", 1e-5)
    assert parse(parser, ["--rank", "0"], 1e-5).method == "full"
    assert capsys.readouterr().err == ""
