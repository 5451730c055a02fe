"""Generation: the cache changes nothing, rows end where they should, errors name the numbers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from llama import Llama
from minillm import add_lora, generate
from minillm.errors import UserError
from minillm.generate import LONG, generate_steps
from minillm.sampling import Sampling
from minillm.text_stream import StopStrings
from tests.conftest import MODELS, sharp, small_config

PROMPTS = [[5, 6, 7, 8, 9], [3], [4] * 20, list(range(10, 22))]
SAMPLING = {
    "temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3,
    "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama-gqa", "gpt2", "phi"])
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.5}, SAMPLING])
def test_cache_on_equals_cache_off_in_a_ragged_batch(model, settings):
    on = generate(model, PROMPTS, 30, **settings)
    assert on == generate(model, PROMPTS, 30, use_cache=False, **settings)
    assert [len(row) for row in on] == [30] * 4


@pytest.mark.parametrize("settings", [{}, SAMPLING])
def test_a_row_does_not_depend_on_its_neighbours(model, settings):
    together = generate(model, PROMPTS, 15, **settings)
    assert together[0] == generate(model, PROMPTS[:1], 15, **settings)[0]
    assert together[:2] == generate(model, PROMPTS[:2], 15, **settings)


def test_a_long_answer_begins_as_a_short_one(model):
    """From LONG tokens on, the weights are packed for as long as it takes."""
    long = generate(model, PROMPTS, LONG)
    assert [row[: LONG - 1] for row in long] == generate(model, PROMPTS, LONG - 1)


def test_two_calls_in_a_row_do_not_share_a_cache(model):
    assert generate(model, PROMPTS, 10) == generate(model, PROMPTS, 10)


def test_a_seed_repeats_a_sample_and_another_changes_it(model):
    draw = {"temperature": 1.0, "top_p": 1.0}
    a, b, c = (generate(model, [[1]], 20, seed=s, **draw) for s in (1, 1, 2))
    assert a == b != c


def test_a_row_ends_with_its_eos_and_others_go_on(model):
    free = generate(model, PROMPTS, 12)
    eos = free[0][4]
    ended = generate(model, PROMPTS, 12, eos_id=eos)
    assert ended == [r[: r.index(eos) + 1] if eos in r else r for r in free]
    assert len(ended[0]) <= 5


class Letters:
    """A tokenizer of which every id is a letter, and every 16th a space."""

    def decode(self, ids: list[int]) -> str:
        return "".join("abcdefghijklmno "[i % 16] for i in ids)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_ends_at_its_stop_string_and_others_go_on(model, use_cache):
    free = generate(model, PROMPTS, 20)
    texts = [Letters().decode(row) for row in free]
    stop = StopStrings(Letters(), (texts[0][4:7], texts[2][9:12]))
    ended = generate(model, PROMPTS, 20, stop=stop, use_cache=use_cache)
    for row, was, text in zip(ended, free, texts, strict=True):
        ends = [text.find(s) + 3 for s in stop.strings if s in text]
        assert row == was[: min(ends, default=20)]
    assert len(ended[0]) <= 7 and len(ended[2]) <= 12


def test_generation_stops_where_the_context_is_full(model):
    assert len(generate(model, [[1] * 120], 50)[0]) == 8
    assert generate(model, [[1] * 120], 50) == generate(model, [[1] * 120], 50, use_cache=False)


def test_generating_leaves_mode_and_weights_as_they_were():
    model = sharp(Llama(small_config()))
    add_lora(model, ("wq",), 4, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        generate(model, [[1, 2]], 3)
        assert model.training is mode
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_to_do_gives_nothing(model):
    assert generate(model, [], 5) == []
    assert generate(model, [[1], [2]], 0) == [[], []]


def test_prompts_may_be_one_tensor(model):
    prompts = [[1, 2], [3, 4]]
    assert generate(model, torch.tensor(prompts), 3) == generate(model, prompts, 3)


def test_numbers_may_be_numpys(model):
    want = generate(model, [[1, 2]], 3, top_k=5, temperature=1.0, seed=1)
    how = {"top_k": np.int64(5), "temperature": 1.0, "seed": 1}
    assert generate(model, [np.array([1, 2])], np.int64(3), **how) == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 2: no tokens"),
        ({"prompts": [[1] * 128]}, "128 tokens.*128"),
        ({"prompts": [[1] * 500]}, "500 tokens.*128"),
        ({"prompts": [[1, 2048]]}, "1 to 2048.*0 to 2047"),
        ({"prompts": [[-1]]}, "-1"),
        ({"prompts": [1, 2]}, "prompt 1: 1; give a list of prompts"),
        ({"prompts": torch.tensor([1, 2])}, "prompt 1: tensor.1.; give a list of prompts"),
        ({"prompts": ["One"]}, "prompt 1: .One.; give a list of prompts"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_k": 2.5}, "top_k 2.5"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5"),
        ({"prompts": [[1.5, 2]]}, "prompt 1: holds more than whole numbers"),
        ({"prompts": [torch.tensor([1.0])]}, "prompt 1: holds more than whole numbers"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"max_new_tokens": -1}, "max_new_tokens -1"),
        ({"eos_id": [2]}, "eos_id .2.: not one whole number"),
        ({"eos_id": torch.tensor([2, 3])}, "eos_id tensor"),
        ({"temperature": "1"}, "temperature '1': not a number"),
        ({"temperature": None}, "temperature None: not a number"),
        ({"temperature": 1.0, "seed": 2**64}, "seed 18446744073709551616: must be"),
        ({"temperature": 1.0, "seed": 1.5}, "seed 1.5: must be a whole number"),
        ({"temperature": 1.0, "seed": 2**70}, "seed 1180591620717411303424: must be"),
        ({"prompt": [[0.5] * 64]}, r"prompt of type list: this model takes a soft prompt \(P, "),
        ({"prompt": torch.zeros(127, 32)}, r"prompt \(127, 32\): leaves no room"),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_cannot_be_generated_is_refused_with_its_numbers(model, change, message, use_cache):
    arguments = {"prompts": [[1]], "max_new_tokens": 3, "use_cache": use_cache} | change
    with pytest.raises(UserError, match=message):
        generate(model, **arguments)


def test_a_cache_refuses_more_rows_or_columns_than_it_has(model):
    cache = model.new_cache(2, 4)
    for tokens in (torch.ones(2, 5), torch.ones(1, 3)):
        with pytest.raises(UserError, match="cache: made for 2 rows of 4 columns"):
            model(tokens.long(), cache)
    assert cache.length == 0


def test_a_narrower_cache_is_a_rounded_one(model):
    tokens = torch.randint(0, 2048, (1, 12))
    cache = model.new_cache(1, 12, torch.bfloat16)
    found = torch.cat([model(part, cache) for part in tokens.split(3, 1)], 1)
    assert found.dtype == torch.float32 and not torch.equal(found, model(tokens))
    wide = model.new_cache(1, 12, torch.float64)
    found = torch.cat([model(part, wide) for part in tokens.split(3, 1)], 1)
    torch.testing.assert_close(found, model(tokens), atol=1e-4, rtol=0)


class Fixed(nn.Module):
    """A model that gives every position the same logits."""

    def __init__(self, *logits: float):
        super().__init__()
        self.config = small_config(vocab_size=len(logits))
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, tokens, cache, left_pad, prompt, logits_at):
        return self.logits.expand(int(logits_at.sum()), -1)


def test_the_end_of_a_text_is_not_penalized():
    settings = {"repetition_penalty": 2.0, "use_cache": False}
    assert generate(Fixed(1.0, 2.0, 3.0), [[2, 0]], 1, **settings) == [[1]]
    assert generate(Fixed(1.0, 2.0, 3.0), [[2, 0]], 1, eos_id=2, **settings) == [[2]]


def test_a_padding_is_not_penalized():
    settings = {"repetition_penalty": 2.0, "use_cache": False}
    assert generate(Fixed(3.0, 2.0, 1.0), [[2], [2, 2, 2]], 1, **settings) == [[0], [0]]


def test_a_step_tells_the_logits_before_any_penalty():
    sampling = Sampling(repetition_penalty=2.0)
    (step,) = generate_steps(Fixed(3.0, 2.0), [[0]], 1, sampling, use_cache=False)
    assert step.logits.tolist() == [[3.0, 2.0]] and step.tokens == [1]


def test_a_steps_logits_may_meet_autograd(model):
    (step,) = generate_steps(model, [[1]], 1, Sampling())
    assert not step.logits.is_inference()


def test_without_a_seed_samples_follow_the_global_stream(model):
    def draw() -> list[list[int]]:
        return generate(model, [[1]], 20, temperature=1.0)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert first == draw() != second


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_soft_prompt_of_another_model_is_refused(model, use_cache):
    for shape in ((8, model.config.dim + 1), (model.config.dim,), (1, 8, model.config.dim)):
        with pytest.raises(UserError, match=r"takes a soft prompt \(P, "):
            generate(model, [[1]], 3, use_cache, prompt=torch.randn(shape))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_soft_prompt_takes_its_room_from_the_context(model, use_cache):
    prompt = torch.randn(8, model.config.dim)
    assert len(generate(model, [[1] * 118], 50, use_cache, prompt=prompt)[0]) == 2


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3), 2**64 - 1, -(2**63)])
def test_any_whole_number_of_64_bits_is_a_seed(model, seed):
    written = generate(model, [[1]], 3, temperature=1.0, seed=seed)
    assert written == generate(model, [[1]], 3, temperature=1.0, seed=int(seed))
