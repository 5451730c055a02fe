"""Phi: its logits are transformers', its files go both ways, and every tool takes it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.errors import UserError
from minillm.peft_format import load_adapter
from phi import Phi, PhiConfig, load_phi, save_phi
from tests.conftest import sharp
from tools import evaluate, generate, prove
from train import finetune_phi

SIZES = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "hidden_dim": 96,
         "max_seq_len": 128}  # fmt: skip


def small(bpe, **changes) -> Phi:
    return sharp(Phi(PhiConfig(**(SIZES | {"vocab_size": bpe.vocab_size} | changes))))


@pytest.fixture
def folder(bpe, tmp_path):
    save_phi(small(bpe), bpe, tmp_path / "phi")
    return tmp_path / "phi"


@pytest.mark.parametrize("changes", [
    {}, {"n_kv_heads": 2}, {"rotary_share": 0.25}, {"rotary_share": 1.0},
    {"dim": 40, "n_heads": 2, "n_kv_heads": 2, "rotary_share": 0.4},
])  # fmt: skip
def test_logits_are_those_of_transformers(bpe, tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    model = small(bpe, **changes)
    save_phi(model, bpe, tmp_path / "phi")
    peer = transformers.PhiForCausalLM.from_pretrained(tmp_path / "phi")
    tokens = torch.randint(bpe.vocab_size, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_one_layer_of_the_real_size_has_transformers_logits():
    transformers = pytest.importorskip("transformers")
    c = PhiConfig.preset("phi-1.5")
    config = transformers.PhiConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim,
        num_hidden_layers=1, num_attention_heads=c.n_heads, max_position_embeddings=c.max_seq_len,
        partial_rotary_factor=c.rotary_share, attn_implementation="eager",
    )  # fmt: skip
    peer = transformers.PhiForCausalLM(config).eval()
    model = Phi(replace(c, n_layers=1))
    state = {name.removeprefix("model."): value for name, value in peer.state_dict().items()}
    model.load_state_dict(state)
    tokens = torch.randint(c.vocab_size, (1, 64))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)


def test_a_folder_of_transformers_comes_back_bit_for_bit(bpe, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    peer = transformers.PhiForCausalLM.from_pretrained(folder)
    peer.save_pretrained(tmp_path / "theirs")
    model, _ = load_phi(tmp_path / "theirs", tokenizer=folder)
    save_phi(model, bpe, tmp_path / "ours")
    ours, first = (load_file(where / "model.safetensors") for where in (tmp_path / "ours", folder))
    assert ours.keys() == first.keys()
    assert all(torch.equal(ours[name], first[name]) for name in first)


def test_a_tensor_that_is_there_twice_is_refused(folder):
    state = load_file(folder / "model.safetensors")
    norm = "model.final_layernorm.weight"
    save_file(state | {norm.removeprefix("model."): state[norm] + 1}, folder / "model.safetensors")
    with pytest.raises(UserError, match="a second time"):
        load_phi(folder)


def test_the_first_layers_alone_are_read(folder):
    model, _ = load_phi(folder, n_layers=1)
    assert len(model.layers) == 1


@pytest.mark.parametrize("change", [{"model_type": "gpt2"}, {"qk_layernorm": True},
                         {"partial_rotary_factor": 0.01}, {"hidden_act": "relu"},
                         {"rope_scaling": {"type": "linear", "factor": 2.0}},
                         {"rope_scaling": {"type": "default", "rope_theta": 77.0}},
                         {"num_attention_heads": 7}, {"architectures": ["PhiModel"]}])  # fmt: skip
def test_a_config_that_is_not_phi_is_refused(folder, change):
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match="config.json"):
        load_phi(folder)


def test_a_phi_with_a_tied_head_is_not_saved_as_what_would_not_be_read(bpe, tmp_path):
    with pytest.raises(UserError, match="tied head"):
        save_phi(small(bpe, tied_head=True), bpe, tmp_path / "tied")
    assert not (tmp_path / "tied").exists()


def test_it_is_fine_tuned_generated_from_and_measured_as_the_others(folder, tmp_path):
    run = tmp_path / "run"
    before, after = finetune_phi.main([
        "--checkpoint", str(folder), "--samples", "16", "--held-out", "4", "--max-length", "100",
        "--epochs", "2", "--accumulation-steps", "4", "--lr", "0.01", "--out-dir", str(run),
    ])  # fmt: skip
    assert after < before
    ask = ["--adapter", str(run / "adapter"), "--prompt", "the cat", "--max-new-tokens", "8"]
    assert generate.main(ask) == generate.main([*ask, "--no-cache"])
    reports = evaluate.main(["--task", "shakespeare", "--adapter", str(run / "adapter"),
                             "--samples", "4", "--max-new-tokens", "8"])  # fmt: skip
    assert reports


def test_every_promise_holds_on_it(folder):
    assert all(finding.holds for finding in prove.main(["--checkpoint", str(folder)]))


def test_an_adapter_of_pefts_on_the_head_loads(folder, tmp_path):
    """Beside it PEFT writes the head itself, weight and bias."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    peer = transformers.PhiForCausalLM.from_pretrained(folder)
    settings = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM",
                               init_lora_weights=False)  # fmt: skip
    peer = peft.get_peft_model(peer, settings).eval()
    peer.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load_phi(folder)[0].eval(), tmp_path / "adapter")
    tokens = torch.randint(model.config.vocab_size, (2, 48))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=2e-4, rtol=0)
