"""What a config says: the published sizes, every number of a folder, and what is refused."""

import json

import pytest
import torch

from gpt2 import GPT2, load_gpt2, save_gpt2
from llama import Llama, LlamaConfig, load_llama, save_llama
from minillm.checkpoint import empty_model
from minillm.errors import UserError
from phi import Phi, PhiConfig, load_phi, save_phi
from tests.conftest import sharp, small_config, small_gpt2, small_phi


def test_the_published_llamas_have_their_published_sizes():
    for name, count in (("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320),
                        ("llama-2-70b", 68_976_648_192)):  # fmt: skip
        config = LlamaConfig.preset(name)
        model = empty_model(lambda config=config: Llama(config))
        assert sum(p.numel() for p in model.parameters()) == count
        assert config.norm_eps == 1e-5  # transformers' own default is 1e-6


def test_the_published_phis_have_their_published_sizes():
    for name, count, rotated in (("phi-1.5", 1_418_270_720, 32), ("phi-2", 2_779_683_840, 32)):
        config = PhiConfig.preset(name)
        model = empty_model(lambda config=config: Phi(config))
        assert sum(p.numel() for p in model.parameters()) == count
        assert config.rotary_dim == rotated and config.norm_eps == 1e-5


ODD = {"norm_eps": 3e-3, "max_seq_len": 96}


def odd(kind: str, vocab_size: int):
    changes = ODD | {"vocab_size": vocab_size}
    if kind == "gpt2":
        return sharp(GPT2(small_gpt2(**changes)))
    if kind == "phi":
        return sharp(Phi(small_phi(**changes, rope_theta=77.0, rotary_share=0.25)))
    return sharp(Llama(small_config(**changes, rope_theta=77.0)))


@pytest.fixture(params=["llama", "gpt2", "phi"])
def odd_folder(request, tokenizer, bpe, tmp_path):
    """A model whose every number is not the default, its folder, and how it is loaded."""
    text, save, load = {"llama": (tokenizer, save_llama, load_llama),
                        "gpt2": (bpe, save_gpt2, load_gpt2),
                        "phi": (bpe, save_phi, load_phi)}[request.param]  # fmt: skip
    model = odd(request.param, text.vocab_size)
    save(model, text, tmp_path / "odd")
    return model, tmp_path / "odd", load


def test_every_number_of_a_config_comes_back(odd_folder):
    model, folder, load = odd_folder
    assert load(folder)[0].config == model.config


def test_transformers_reads_every_number_of_a_config(odd_folder):
    transformers = pytest.importorskip("transformers")
    model, folder, _ = odd_folder
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(model.config.vocab_size, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=1e-4)
    assert peer.config.max_position_embeddings == model.config.max_seq_len


LEFT_OUT = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta",
            "rope_parameters", "partial_rotary_factor", "activation_function",
            "hidden_act", "tie_word_embeddings")  # fmt: skip


def test_a_number_that_a_config_leaves_out_is_what_transformers_takes(odd_folder):
    transformers = pytest.importorskip("transformers")
    model, folder, load = odd_folder
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in LEFT_OUT}
    (folder / "config.json").write_text(json.dumps(config))
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours, tokens = load(folder)[0], torch.randint(model.config.vocab_size, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), peer(tokens).logits, atol=1e-4, rtol=1e-4)
    eps = {getattr(peer.config, name) for name in LEFT_OUT[:3] if hasattr(peer.config, name)}
    assert eps == {ours.config.norm_eps}


@pytest.mark.parametrize("field", [
    {"scale_attn_weights": False}, {"activation_function": "gelu"}, {"n_inner": 96},
])  # fmt: skip
def test_a_gpt2_that_computes_otherwise_is_refused(field, bpe, tmp_path):
    save_gpt2(GPT2(small_gpt2(vocab_size=300)), bpe, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(UserError, match=f"{[*field][0]} .* is not GPT-2"):
        load_gpt2(tmp_path)


def test_a_llama_with_a_sliding_window_is_refused(tokenizer, tmp_path):
    save_llama(Llama(small_config()), tokenizer, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 16}))
    with pytest.raises(UserError, match="sliding_window 16 is not LLaMA-2"):
        load_llama(tmp_path)
