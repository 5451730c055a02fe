"""train/pretrain.py: from stories to a folder that loads, and what the bundled model can do."""

import json
import re
from itertools import islice

import pytest
import torch

from gpt2 import load_gpt2
from llama import FAMILY as LLAMA
from llama import Llama, load_llama
from minillm import generate
from minillm.cli import settings_of
from minillm.data.batches import Batches, encode_samples
from minillm.data.samples import Sample
from minillm.data.tinyworld import articles, reviews, stories
from minillm.errors import UserError
from minillm.losses import token_loss
from minillm.runs import Run
from minillm.training import evaluate
from phi import load_phi
from tests.conftest import FP32, MODELS, ROOT, TINY_GPT2, TINY_LLAMA, small_config
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


@pytest.mark.parametrize(("size", "message"), [
    ("9", r"9: too few pieces for these texts \(.*raise it"),
    ("99999", r"99999: these texts do not make so many \(.*lower it"),
    ("320", r"320: a text has \d+ tokens, the context is 512; raise it"),
])  # fmt: skip
def test_a_vocabulary_that_cannot_be_leaves_no_run_behind(size, message, tmp_path):
    with pytest.raises(UserError, match=message):
        pretrain.main([*SMALL, "--vocab-size", size, "--out-dir", str(tmp_path / "a")])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("flags", "message"), [
    ([], "a run is there already"), (["--resume", "--lr", "9"], "began with --lr 0.002, not 9.0"),
    (["--resume", "--out-dir", ""], "no run is named"),
])  # fmt: skip
def test_a_folder_that_cannot_be_taken_is_refused_before_the_texts_are_made(
    flags, message, tmp_path
):
    begun = [*SMALL, "--vocab-size", "9", "--out-dir", str(tmp_path / "a")]  # fails at the texts
    Run(tmp_path / "a", settings_of(pretrain.parse_args(begun)))
    with pytest.raises(UserError, match=message):
        pretrain.main([*begun, *flags])


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


def test_nothing_that_is_fine_tuned_on_or_held_out_is_read_before():
    held_out = {story.text for story in islice(stories(1), 30)}
    first = next(stories(0)).text
    texts = pretrain.training_texts(40, 20, 10, held_out | {first})
    assert first not in texts and not held_out & set(texts) and len(texts) == 40 + 3 + 10
    told = "\n".join(texts)
    written = [row["text"] for row in reviews(20, pretrain.OTHERS_SEED)]
    assert all(text in told for text in written)  # the last, shorter page as well
    own = {row["text"] for row in reviews(400)}  # short ones may coincide
    others = [row["text"] for row in reviews(400, pretrain.OTHERS_SEED)]
    assert sum(text in own for text in others) < 40
    assert not any(row["article"] in told for row in articles(100))


def test_the_entropy_is_that_of_the_held_out_stories_over_what_is_predicted_of_them():
    _, rows, tests, entropy = pretrain.make_data(LLAMA, 50, 0, 0, 8, 500)
    held_out = list(islice(stories(pretrain.HELD_OUT_SEED), 8))
    n_predicted = sum(len(row.tokens) - 1 for row in tests)
    assert entropy == pytest.approx(sum(story.nats for story in held_out) / n_predicted)
    assert len(rows) == 50 and len(tests) == 8


def test_an_eighth_of_the_rows_passes_the_first_blocks_alone_and_each_row_once():
    tokens = torch.randint(0, 2048, (16, 12))
    model = Llama(small_config())
    loss, count = pretrain.prefix_loss(model, (tokens, tokens))
    short = pretrain.first_layers(model, 1)  # of two
    parts = [token_loss(m, (t, t))[0] for m, t in ((model, tokens[:14]), (short, tokens[14:]))]
    assert count == 16 * 11 and torch.equal(loss, sum(parts))


def test_the_figures_beside_a_model_are_those_of_the_file(tmp_path):
    flags = [*SMALL, "--preset", "tiny-phi", "--model", "phi", "--seed", "3", "--lr", "0.01",
             "--max-iters", "2", "--out-dir", str(tmp_path / "a")]  # fmt: skip
    pretrain.main(flags)
    model, tokenizer = load_phi(tmp_path / "a" / "model")
    facts = json.loads((tmp_path / "a" / "model" / "pretraining.json").read_text())
    texts = [Sample("", story.text) for story in islice(stories(pretrain.HELD_OUT_SEED), 10)]
    tests = Batches(encode_samples(texts, tokenizer, 10**6).rows, 16, tokenizer.pad_id, None,
                    model.config.max_seq_len)  # fmt: skip
    assert evaluate(model, token_loss, tests, FP32) == facts["held_out_loss"]
    for n, loss in facts["held_out_loss_by_layers"].items():
        cut, _ = load_phi(tmp_path / "a" / "model", n_layers=int(n))
        assert evaluate(cut, token_loss, tests, FP32) == pytest.approx(loss, rel=1e-6)
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        pretrain.main(flags)
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before
    row = json.loads(before.splitlines()[0])
    assert row["lr"] == 0.01 and row["supervised_tokens"] < row["tokens"]
