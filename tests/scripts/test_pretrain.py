"""train/pretrain.py: from stories to a folder that loads, and what the bundled model can do."""

import json
import re

import pytest
import torch

from gpt2 import load_gpt2
from llama import Llama, load_llama
from minillm import generate
from minillm.losses import token_loss
from phi import load_phi
from tests.conftest import MODELS, ROOT, TINY_GPT2, TINY_LLAMA, small_config
from train import pretrain

SMALL = ["--stories", "60", "--held-out", "10", "--vocab-size", "600",
         "--reviews", "16", "--articles", "4", "--batch-size", "4", "--eval-every", "2",
         "--precision", "fp32"]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "load"),
    [("phi", load_phi), pytest.param("gpt2", load_gpt2, marks=pytest.mark.slow),
     pytest.param("llama", load_llama, marks=pytest.mark.slow)],
)
def test_a_short_run_writes_a_model_and_its_figures(tmp_path, family, load):
    flags = [*SMALL, "--model", family, "--epochs", "1", "--max-iters", "3"]
    whole = pretrain.main([*flags, "--out-dir", str(tmp_path / "a")])
    model, tokenizer = load(tmp_path / "a" / "model")
    assert tokenizer.vocab_size == model.config.vocab_size == 600
    facts = json.loads((tmp_path / "a" / "model" / "pretraining.json").read_text())
    assert facts["held_out_loss"] == whole > facts["generator_entropy"] > 0
    by_layers = {str(n) for n in range(1, model.config.n_layers)}
    assert set(facts["held_out_loss_by_layers"]) == by_layers


@pytest.mark.parametrize("kind", MODELS)
def test_first_layers_share_every_tensor(kind):
    model = MODELS[kind]()
    short = pretrain.first_layers(model, 1)
    names = dict(model.named_parameters())
    assert all(p is names[n] for n, p in short.named_parameters()) and short.config.n_layers == 1
    assert short(torch.tensor([[1, 2]])).shape == (1, 2, 2048)


@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_gets_a_gradient_from_the_mixed_loss(kind):
    model = MODELS[kind]()
    tokens = torch.randint(0, 2048, (8, 12))
    loss, count = pretrain.prefix_loss(model, (tokens, tokens))
    loss.backward()
    assert count == 88 and all(p.grad is not None for p in model.parameters())


def test_evaluation_uses_the_whole_model():
    model = Llama(small_config()).eval()
    tokens = torch.randint(0, 2048, (4, 12))
    batch = (tokens, tokens)
    assert pretrain.prefix_loss(model, batch)[0] == token_loss(model, batch)[0]


BUNDLED = pytest.mark.parametrize(
    ("folder", "load"),
    [(TINY_LLAMA, load_llama), (TINY_GPT2, load_gpt2), (ROOT / "checkpoints/tiny-phi", load_phi)],
    ids=["llama", "gpt2", "phi"],
)


@BUNDLED
def test_the_bundled_model_is_small_and_near_the_generators_entropy(folder, load):
    assert sum(f.stat().st_size for f in folder.iterdir()) < 8_000_000
    facts = json.loads((folder / "pretraining.json").read_text())
    assert facts["generator_entropy"] < facts["held_out_loss"] < 1.5 * facts["generator_entropy"]


@BUNDLED
def test_the_bundled_model_tells_a_story_of_its_world(folder, load):
    model, tokenizer = load(folder)
    prompt = tokenizer.encode("One morning, Nora", bos=True)
    (new,) = generate(model, [prompt], 400, eos_id=tokenizer.eos_id)
    text = tokenizer.decode(prompt + new)
    assert new[-1] == tokenizer.eos_id and text.endswith((".", '"', "!"))
    words = set(re.findall(r"[A-Za-z]+", text))
    assert len(words) > 50 and "Nora" in words


@BUNDLED
@pytest.mark.parametrize("layers", [1, 3])
def test_the_first_layers_alone_are_a_language_model(folder, load, layers):
    facts = json.loads((folder / "pretraining.json").read_text())
    by_layers = facts["held_out_loss_by_layers"]
    assert facts["held_out_loss"] < by_layers[str(layers)] < 3.0
