"""The hand-written GPT-2: what is its own, and its equality with transformers'."""

import pytest
import torch

import gpt2.model
from gpt2 import GPT2, GPT2Config, load_gpt2, save_gpt2
from minillm.attention import causal_attention
from minillm.errors import UserError
from tests.conftest import sharp, small_gpt2


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
     ("gpt2-xl", 1_557_611_200)],
)  # fmt: skip
def test_the_published_sizes_have_their_published_parameter_counts(name, count):
    with torch.device("meta"):
        model = GPT2(GPT2Config.preset(name))
    assert sum(p.numel() for p in model.parameters()) == count


def test_logits_equal_transformers(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = sharp(GPT2(small_gpt2(vocab_size=300)))
    save_gpt2(model, bpe, tmp_path)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, 300, (2, 64))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_logits_equal_transformers_at_the_size_of_124m(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    peer.save_pretrained(tmp_path)
    bpe.save(tmp_path)
    (tmp_path / "vocab.json").unlink()
    model, _ = load_gpt2(tmp_path)
    tokens = torch.randint(0, 50257, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)


def test_dropout_acts_in_training_only():
    model = sharp(GPT2(small_gpt2()))
    tokens = torch.randint(0, 2048, (2, 30))
    plain = model(tokens)
    model.dropout = 0.1
    assert not torch.equal(model(tokens), plain)
    assert torch.equal(model.eval()(tokens), plain)


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_dropout_of_attention_weights_keeps_the_mean(attention):
    q, k, v = torch.randn(3, 1, 2, 8, 4, dtype=torch.float64)
    draws = torch.stack([causal_attention(q, k, v, None, attention, 0.2) for _ in range(2000)])
    error = (draws.mean(0) - causal_attention(q, k, v, None, attention)).abs()
    assert (error < 5 * draws.std(0) / 2000**0.5 + 1e-12).all() and draws.std(0).max() > 0.1


@pytest.mark.parametrize("change", [{"n_heads": 3}, {"n_layers": 0}, {"dim": -4}, {"norm_eps": 0}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(UserError):
        small_gpt2(**change)


@pytest.mark.parametrize("training", [True, False])
def test_gpt2s_dropout_falls_on_embeddings_weights_and_both_branches(training, monkeypatch):
    model, seen = GPT2(small_gpt2()).train(training), []
    model.dropout, model.attention = 0.1, "explicit"
    real = torch.nn.functional.dropout

    def dropout(x, p, *more, **named):
        seen.append((tuple(x.shape), p))
        return real(x, p, *more, **named)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    model(torch.randint(2048, (2, 16)))
    stream, weights = ((2, 16, 32), 0.1), ((2, 4, 16, 16), 0.1)
    want = [stream, *[weights, stream, stream] * 2] if training else []
    assert [call for call in seen if call[1]] == want


def test_gpt2s_attention_has_its_dropout_when_fused(monkeypatch):
    told, real = [], gpt2.model.causal_attention

    def attention(*args):
        told.append(args[5:])
        return real(*args)

    monkeypatch.setattr(gpt2.model, "causal_attention", attention)
    model = GPT2(small_gpt2())
    model.dropout = 0.1
    for training in (True, False):
        model.train(training)(torch.randint(2048, (1, 8)))
    assert told == [(0.1,)] * 2 + [(0.0,)] * 2
