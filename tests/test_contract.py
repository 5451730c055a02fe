"""The contract between engine and model, held by every model: equal to itself computed another
way, whatever of cache, padding, soft prompt, attention and checkpointing is used."""

import pytest
import torch
from torch import nn

from gpt2 import GPT2
from llama import Llama
from minillm import add_lora, generate, mark_only_lora_as_trainable
from minillm.checkpoint import empty_model, materialize
from minillm.errors import UserError
from minillm.losses import token_loss
from phi import Phi
from tests.conftest import MODELS, equal_states, small_config, small_gpt2, small_phi

RAGGED = [[5, 6, 7, 8, 9], [3], [4] * 20, list(range(10, 22))]


@pytest.fixture(params=MODELS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind) -> nn.Module:
    return MODELS[kind]().double()


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_cached_logits_equal_uncached_at_every_chunking(model, attention):
    model.attention = attention
    tokens = torch.randint(0, 2048, (2, 40))
    whole = model(tokens)
    for cuts in ([40], [1] * 40, [7, 13, 1, 19], [39, 1]):
        cache = model.new_cache(2, 40)
        parts = [model(chunk, cache) for chunk in tokens.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)
        assert cache.length == 40


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_ragged_batch_equals_one_row_at_a_time(model, attention, cached):
    model.attention = attention
    rows = [torch.randint(0, 2048, (n,)) for n in (1, 9, 24, 17)]
    pads = torch.tensor([24 - len(row) for row in rows])
    tokens = torch.stack([torch.nn.functional.pad(r, (24 - len(r), 0)) for r in rows])
    if cached:
        cache = model.new_cache(4, 24)
        parts = [model(chunk, cache, pads) for chunk in tokens.split([10, 13, 1], dim=1)]
        logits = torch.cat(parts, 1)
    else:
        logits = model(tokens, left_pad=pads)
    for row, pad, got in zip(rows, pads, logits, strict=True):
        torch.testing.assert_close(got[pad:], model(row[None])[0], atol=1e-10, rtol=0)


def test_explicit_attention_equals_sdpa(model):
    tokens, pads = torch.randint(0, 2048, (3, 30)), torch.tensor([0, 29, 11])
    fused = model(tokens, left_pad=pads)
    model.attention = "explicit"
    torch.testing.assert_close(model(tokens, left_pad=pads), fused, atol=1e-10, rtol=0)


def test_no_token_sees_a_later_one(model):
    tokens = torch.randint(0, 2048, (1, 30))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 2048
    assert torch.equal(model(tokens)[:, :20], model(changed)[:, :20])


def test_logits_at_gives_the_chosen_rows(model):
    tokens = torch.randint(0, 2048, (3, 12))
    where = torch.rand(3, 12) < 0.3
    torch.testing.assert_close(
        model(tokens, logits_at=where), model(tokens)[where], atol=1e-10, rtol=0
    )


def test_a_soft_prompt_of_token_embeddings_equals_those_tokens(model):
    tokens = torch.randint(0, 2048, (2, 15))
    soft = next(model.children())(torch.tensor([7, 8, 9]))  # its token embedding
    real = torch.cat((torch.tensor([[7, 8, 9]]).expand(2, -1), tokens), 1)
    torch.testing.assert_close(model(tokens, prompt=soft), model(real)[:, 3:], atol=1e-10, rtol=0)


def test_a_soft_prompt_works_with_cache_and_ragged_rows(model):
    soft = torch.randn(4, 32, dtype=torch.float64)
    arguments = {"max_new_tokens": 12, "prompt": soft}
    together = generate(model, RAGGED, **arguments)
    assert together == generate(model, RAGGED, use_cache=False, **arguments)
    assert together == [generate(model, [row], **arguments)[0] for row in RAGGED]
    assert together != generate(model, RAGGED, 12)


def test_gradients_with_checkpointing_equal_those_without(kind):
    targets = {"gpt2": ("q", "v", "c_fc"), "phi": ("q_proj", "v_proj", "fc2")}.get(
        kind, ("wq", "wv", "w2"))  # fmt: skip

    def gradients(checkpointing: bool) -> list:
        torch.manual_seed(1)
        model = MODELS[kind]()
        add_lora(model, targets, rank=4, alpha=8, dropout=0.3)
        mark_only_lora_as_trainable(model)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter)
        model.dropout = 0.2  # GPT-2's own
        model.gradient_checkpointing = checkpointing
        tokens = torch.randint(0, 2048, (2, 20))
        torch.manual_seed(2)
        token_loss(model, (tokens, tokens))[0].backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, checkpointed) and plain.abs().sum() > 0


def test_too_many_tokens_is_an_error_with_both_numbers(model):
    with pytest.raises(UserError, match=r"129.*128"):
        model(torch.zeros(1, 129, dtype=torch.int64))


def test_at_most_seven_of_our_frames_lead_to_the_softmax(monkeypatch, kind):
    """Script, main, train, loss, model, block, attention: here from `train` on, so at most five."""
    import traceback

    from minillm.data.batches import Batches, Row
    from minillm.precision import choose_precision
    from minillm.training import TrainSettings, train
    from tests.conftest import ROOT

    seen, softmax = [], torch.softmax
    rooms = tuple(f"{ROOT}/{room}/" for room in ("minillm", "llama", "gpt2", "phi"))

    def spy(*args, **kwargs):
        seen.append([f for f in traceback.extract_stack() if f.filename.startswith(rooms)])
        return softmax(*args, **kwargs)

    monkeypatch.setattr(torch, "softmax", spy)
    model = MODELS[kind]()
    model.attention = "explicit"
    rows, precision = [Row(torch.arange(5), torch.arange(5))], choose_precision("fp32", "cpu")
    train(model, token_loss, Batches(rows, 1, 0), None, TrainSettings(), precision)
    assert seen and all(len(frames) <= 5 for frames in seen)


def test_a_text_may_fill_the_context_and_cached_columns_count(model):
    tokens, cache = torch.ones(1, 128, dtype=torch.int64), model.new_cache(1, 200)
    assert model(tokens).shape == (1, 128, 2048)
    model(tokens[:, :120], cache)
    with pytest.raises(UserError, match="130 tokens"):
        model(tokens[:, :10], cache)


def test_a_cache_that_is_reset_has_forgotten_the_soft_prompt(model):
    cache, prompt = model.new_cache(1, 10), torch.randn(4, 32, dtype=torch.float64)
    model(torch.tensor([[1, 2]]), cache, None, prompt)
    cache.reset()
    assert (cache.length, cache.n_prefix) == (0, 0)


FAMILIES = {"llama": lambda: Llama(small_config(n_layers=8, dim=64)),
            "gpt2": lambda: GPT2(small_gpt2(n_layers=8, dim=64)),
            "phi": lambda: Phi(small_phi(n_layers=8, dim=64))}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_random_weights_are_those_of_the_model_built_in_place(kind):
    torch.manual_seed(3)
    made = materialize(empty_model(FAMILIES[kind]), torch.float32, "cpu")
    torch.manual_seed(3)
    plain = FAMILIES[kind]()
    plain.init_weights()  # the constructor's layers have drawn as well
    torch.manual_seed(3)
    plain.init_weights()
    assert equal_states(made, plain)


@pytest.mark.parametrize("kind", FAMILIES)
def test_weights_begin_with_gpt2s_spread(kind):
    """0.02, the ends of both branches smaller by sqrt(2 n_layers), positions 0.01."""
    model = FAMILIES[kind]()
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == (0 if name.endswith("bias") else 1)).all()
            continue
        at_end = name.removesuffix(".weight").endswith(model.BRANCH_ENDS)
        want = 0.01 if name == "wpe.weight" else 0.02 / 4 if at_end else 0.02
        assert float(weight.std()) == pytest.approx(want, rel=0.1), name


def kept_for_backward(model: nn.Module) -> int:
    """Numbers that a forward keeps."""
    kept = []
    watch = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t,
                                                     lambda t: t)  # fmt: skip
    with watch:
        model(torch.randint(2048, (2, 32)))
    return sum(kept)


@pytest.mark.parametrize("kind", FAMILIES)
def test_checkpointing_keeps_less_for_backward(kind):
    model = FAMILIES[kind]()
    plain, model.gradient_checkpointing = kept_for_backward(model), True
    assert kept_for_backward(model) < 0.5 * plain
