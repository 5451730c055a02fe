"""Section F: impossible requests to generate, and text that comes out in pieces."""

import math

import pytest
import torch

from llama import LlamaTokenizer
from minillm import generate
from minillm.text_stream import TextStream
from tests.conftest import MODELS, TINY_LLAMA
from tests.reliability.conftest import refused

pytestmark = pytest.mark.reliability


@pytest.fixture(params=["llama-gqa", "gpt2"])
def model(request):
    return MODELS[request.param]()


def test_f1_settings(model, tally):
    def one(**settings):
        return generate(model, [[1, 2]], settings.pop("n", 4), seed=0, **settings)

    greedy = one()
    tally("F1", {
        "temperature 0": one(temperature=0.0) == greedy,
        "temperature negative": refused(lambda: one(temperature=-1.0), "temperature"),
        "temperature NaN": refused(lambda: one(temperature=math.nan), "temperature"),
        "top_k 0": one(temperature=1.0, top_k=0) == greedy,
        "top_k beyond": one(temperature=1.0, top_k=10**6) == one(temperature=1.0),
        "top_p 0": one(temperature=1.0, top_p=0.0) == greedy,
        "top_p 1": one(temperature=1.0, top_p=1.0) == one(temperature=1.0),
        "top_p 2": refused(lambda: one(temperature=1.0, top_p=2.0), "top_p"),
        "no new tokens": one(n=0) == [[]],
    })  # fmt: skip


def test_f2_prompts(model, tally):
    context, found = model.config.max_seq_len, {}
    for cached in (True, False):
        def work(n: int, new: int = 5, cached=cached):
            return generate(model, [[1] * n], new, use_cache=cached)

        found["empty", cached] = refused(lambda w=work: w(0), "no tokens")
        found["full", cached] = refused(lambda w=work: w(context), str(context))
        both = str(context + 9), str(context)
        found["over", cached] = refused(lambda w=work: w(context + 9), *both)
        found["to the limit", cached] = len(work(context - 3)[0]) == 3
    tally("F2", found, "scripts begin an empty prompt with BOS or end-of-text")


def test_f3_cache(model, tally):
    found = {}
    for i in range(20):
        prompt = torch.randint(2048, (1 + i,)).tolist()
        on, off = (generate(model, [prompt], 12, use_cache=use) for use in (True, False))
        tokens = torch.tensor([prompt + on[0]])
        past, parts = model.new_cache(1, tokens.size(1)), []
        with torch.no_grad():
            for _ in range(2):  # a cache that was reset is as good as new
                past.reset()
                parts = [model(chunk, past) for chunk in tokens.split(5, dim=1)]
            error = float((torch.cat(parts, 1) - model(tokens)).abs().max())
        found[i] = (on == off and error < 1e-3) or f"{on} {off} {error}"
    tally("F3", found, "chunked, and again after reset; per dtype: tools/prove.py, line cache")


def test_f4_streaming(bpe, tally):
    texts = [
        "日本語", "漢字かな交じり文", "안녕하세요",
        "🙂", "👩‍👩‍👧‍👦", "🇩🇪🇫🇷", "naïve", "Ωμέγα",
        "שלום", "مرحبا", "हिन्दी", "ไทย", "𝔘𝔫𝔦", "e\u0301",
        "🏳️‍🌈", "你好，世界", "ﬁ", "½", "𓀀", "🧑🏽‍💻",
        "Ж", "ß", "„“", "∑∫", "a🙂b漢c",
    ]  # fmt: skip
    found = {}
    for tokenizer in (LlamaTokenizer(TINY_LLAMA / "tokenizer.model"), bpe):
        for text in texts:
            prompt = tokenizer.encode("the ", bos=True)
            stream, tokens = TextStream(tokenizer, prompt), tokenizer.encode(text)
            shown = [stream.push(token) for token in tokens]
            whole = "".join(shown) + stream.finish()
            found[type(tokenizer).__name__, text] = (
                not any("\ufffd" in part for part in shown) and whole.strip() == text.strip()
            ) or whole
    tally("F4", found)
