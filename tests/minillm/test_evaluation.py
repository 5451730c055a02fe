"""Answers and losses of text tasks, and the operations that training them takes."""

import pytest
import torch

from gpt2 import GPT2
from llama import Llama
from minillm.adapt.methods import MethodOptions, adapt
from minillm.checkpoint import empty_model
from minillm.data.samples import Body, Sample
from minillm.data.tasks import TASKS
from minillm.errors import UserError
from minillm.evaluation import answer_room, loss_report, text_report, write_answers
from minillm.flops import training_flops
from tests.conftest import MODELS, small_config, small_gpt2

PROMPTS = ["One morning, Nora", "The cat", "It was a grey day in Pebbleford and nobody was out"]
SAMPLES = [Sample(prompt, f" {text}") for prompt, text in zip(PROMPTS, "abc", strict=True)]


@pytest.fixture(params=["llama-gqa", "gpt2"])
def model(request):
    return MODELS[request.param]().eval()


def test_answers_in_a_batch_are_those_one_by_one(model, tokenizer):
    together = write_answers(model, tokenizer, SAMPLES, 12)
    apart = [write_answers(model, tokenizer, [sample], 12)[0] for sample in SAMPLES]
    assert together == apart


def test_an_answer_knows_whether_it_ended_by_itself(model, tokenizer):
    for answer in write_answers(model, tokenizer, SAMPLES, 12):
        assert answer.stopped == (answer.n_tokens < 12) or answer.n_tokens == 12


def test_a_long_article_leaves_room_for_its_summary(model, tokenizer):
    article = " ".join(["word"] * 500)
    long = Sample(f"{article} So:", " x", body=Body(0, len(article)))
    (answer,) = write_answers(model, tokenizer, [long], 40)
    assert answer.n_tokens == 40 or answer.stopped
    with pytest.raises(UserError, match="sample 1: a prompt of"):
        write_answers(model, tokenizer, [Sample(f"{article} So:", " x")], 40)


def test_the_loss_is_per_token_over_all_rows_not_per_row(model, tokenizer):
    whole = loss_report(model, tokenizer, SAMPLES, 512, batch_size=3)["loss"]
    one_by_one = loss_report(model, tokenizer, SAMPLES, 512, batch_size=1)["loss"]
    assert whole == pytest.approx(one_by_one, abs=1e-4)


def test_summaries_are_held_against_their_baselines():
    row = {"article": "One. Two. Three. Four.", "highlights": "One."}
    sample = Sample("x", " One.", row=row)
    from minillm.evaluation import Answer

    report = text_report(TASKS["cnn_dailymail"], [sample], [Answer("", False, 3)], None)
    assert report["rouge"]["rouge1"]["mean"] == 0 < report["baselines"]["lead-3"]["rouge1"]["mean"]
    assert report["stopped_share"] == 0 and "stemmer" in report["convention"]


def flops(kind: str, method: str, **options) -> float:
    options = {"targets": ("wq",) if "llama" in kind else ("c_attn",), "rank": 1, **options}
    model = empty_model(MODELS_PLAIN[kind])
    adapted, _ = adapt(model, None, method, MethodOptions(**options))
    return training_flops(adapted, 1000, 1000, 10)


def plain(kind: str):
    from gpt2 import GPT2, GPT2Config
    from llama import Llama, LlamaConfig

    if kind == "gpt2":
        return GPT2(GPT2Config(64, 4, 4, vocab_size=512, tied_head=False))
    return Llama(LlamaConfig(64, 4, 4, 2, 512, 128))


MODELS_PLAIN = {kind: lambda kind=kind: plain(kind) for kind in ("llama", "gpt2")}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_full_fine_tuning_takes_6_n_per_token_and_lora_about_4(kind):
    model = empty_model(MODELS_PLAIN[kind])
    matrices = sum(p.numel() for block in model.blocks for p in block.parameters() if p.dim() == 2)
    n = matrices + model.config.vocab_size * model.config.dim
    assert flops(kind, "full") == 6 * n * 1000
    assert flops(kind, "lora") == pytest.approx(4 * n * 1000, rel=0.01)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_the_top_alone_takes_less(kind):
    order = [flops(kind, m) for m in ("last_layer", "last_block", "lora", "full")]
    assert order == sorted(order) and len(set(order)) == 4


def test_checkpointing_adds_one_forward_of_the_blocks():
    model = empty_model(MODELS_PLAIN["gpt2"])
    plain_cost = training_flops(model, 1000, 0, 1)
    model.gradient_checkpointing = True
    assert training_flops(model, 1000, 0, 1) == pytest.approx(plain_cost * 8 / 6)


def test_a_soft_prompts_columns_count_as_tokens(tokenizer):
    model = MODELS["gpt2"]()
    options = MethodOptions(virtual_tokens=10)
    soft, _ = adapt(model, tokenizer, "prompt_tuning", options)
    assert training_flops(soft, 100, 0, 10) == pytest.approx(2 * training_flops(soft, 100, 0, 0))
    assert torch.is_tensor(soft.table)


def test_a_prompt_without_a_body_has_the_whole_context(model, tokenizer):
    """--max-length shortens articles; training takes such a prompt as it is."""
    long = Sample(" ".join(["word"] * 20), " x")
    (answer,) = write_answers(model, tokenizer, [long], 8, max_length=16)
    assert answer.n_tokens <= 8


def test_an_answer_that_leaves_no_room_for_any_text_is_refused(model, tokenizer):
    """All would be asked about nothing, and scored."""
    article = " ".join(["word"] * 50)
    long = Sample(f"{article} So:", " x", body=Body(0, len(article)))
    with pytest.raises(UserError, match="--max-new-tokens"):
        write_answers(model, tokenizer, [long], 40, max_length=40)


def test_the_longest_prompt_that_cannot_be_shortened_bounds_the_answers(tokenizer):
    prompt = "One morning, Nora went to the harbour"
    n = len(tokenizer.encode(prompt, bos=True))
    long = Sample("long " * 99, " x", body=Body(0, 9))
    samples = [Sample("Hi", " x"), Sample(prompt, " x"), long]
    assert answer_room(tokenizer, samples, n + 50, 200) == 50
    assert answer_room(tokenizer, samples, 1000, 200) == 200
    assert answer_room(tokenizer, samples, n, 200) == 1


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_what_is_trained_before_the_blocks_takes_a_backward_through_all_of_them(method, tokenizer):
    soft, _ = adapt(GPT2(small_gpt2()), tokenizer, method, MethodOptions(virtual_tokens=5))
    matrices = sum(p.numel() for b in soft.model.blocks for p in b.parameters() if p.dim() == 2)
    assert training_flops(soft, 100, 0, 0) == 4 * matrices * 100


def test_drawn_answers_depend_on_the_row_and_not_on_the_batch(tokenizer):
    model, samples = Llama(small_config()), [Sample("Say it.", " x")] * 6
    found = [write_answers(model, tokenizer, samples, 8, batch_size=n, seed=1, temperature=1.0)
             for n in (1, 2, 6)]  # fmt: skip
    assert found[0] == found[1] == found[2]
    assert len({answer.text for answer in found[0]}) == 6


def test_a_loss_is_of_what_the_context_holds_however_much_is_allowed(tokenizer):
    model = Llama(small_config(max_seq_len=32))
    samples = [Sample("Say it.", " word" * n) for n in (3, 90)]
    found = [loss_report(model, tokenizer, samples, n, 1) for n in (32, 10_000)]
    assert found[0] == found[1]
