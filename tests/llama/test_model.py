"""The hand-written LLaMA: what is its own, and its equality with transformers'."""

import pytest
import torch

from llama import Llama
from minillm.errors import UserError
from tests.conftest import sharp, small_config


def test_rope_makes_attention_depend_on_distance_only(config):
    """The same tokens two places later give the same logits, with what is before masked out."""
    model = sharp(Llama(config)).double()
    tokens = torch.randint(0, 2048, (1, 12))
    shifted = torch.nn.functional.pad(tokens, (2, 0))
    moved = model(shifted, left_pad=torch.tensor([2]))[:, 2:]
    torch.testing.assert_close(moved, model(tokens), atol=1e-10, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(config, tied):
    transformers = pytest.importorskip("transformers")
    from dataclasses import replace

    from minillm.weights import rope_to_halves

    config = replace(config, tied_head=tied)
    model = sharp(Llama(config))
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=config.dim, intermediate_size=config.hidden_dim, vocab_size=2048,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=config.n_kv_heads,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=tied, max_position_embeddings=128,
    ))  # fmt: skip
    names = model.hf_names()
    state = {}
    for key, weight in model.state_dict().items():
        hf, heads = names[key.removesuffix(".weight")]
        state[f"{hf}.weight"] = rope_to_halves(weight, heads) if heads else weight
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    tokens = torch.randint(0, 2048, (2, 64))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change", [{"n_heads": 3}, {"n_kv_heads": 3}, {"n_layers": 0}, {"dim": -4}, {"vocab_size": -1}]
)
def test_impossible_sizes_are_refused(change):
    with pytest.raises(UserError):
        small_config(**change)
