"""tools/generate.py: stop strings, and --explain, whose numbers are those of the draw."""

import ast
import re

import pytest
import torch

from minillm.errors import UserError
from minillm.sampling import Sampling, candidates, penalize_repetition
from tools import generate
from tools.explain import explain, removed_by

ASK = ["--prompt", "One morning, Nora", "--max-new-tokens", "40"]


def test_a_stop_string_is_where_the_text_ends(capsys):
    (free,) = generate.main(ASK)
    middle = free[len(free) // 2 :][:4]
    for cache in ("--cache", "--no-cache"):
        assert generate.main([*ASK, "--stop", middle, cache]) == [free[: free.index(middle)]]
    assert f"Nora{free[: free.index(middle)]}\n" in capsys.readouterr().out


def test_every_sample_of_a_batch_ends_at_its_own_stop_string():
    drawn = [*ASK, "--samples", "4", "--temperature", "1"]
    free, stopped = generate.main(drawn), generate.main([*drawn, "--stop", "e ", "--stop", "x"])
    assert stopped == [re.split("e |x", text)[0] for text in free] and len(set(stopped)) > 1


def test_explaining_changes_no_text_and_shows_every_step(capsys):
    how = ["--temperature", "1", "--top-k", "30", "--min-p", "0.05", "--seed", "7"]
    plain = generate.main([*ASK, *how])
    capsys.readouterr()
    assert generate.main([*ASK, *how, "--explain", "3"]) == plain
    out = capsys.readouterr().out
    steps = out.split("model     draw  token\n")[1:]
    assert len(steps) == 40 and all(step.count("chosen") == 1 for step in steps)
    assert "top-k 30 removed 2,018 tokens" in out and "removed by min-p 0.05" in out
    lines = [line for step in steps for line in step.splitlines() if " chosen" in line]
    chosen = [ast.literal_eval(line[20:].rpartition("chosen")[0].strip()) for line in lines]
    assert "".join(chosen).strip() == plain[0].strip()


def test_explaining_wants_one_text():
    with pytest.raises(UserError, match="--explain"):
        generate.main([*ASK, "--samples", "2", "--explain"])


def test_beams_write_the_same_text_with_and_without_the_cache_and_take_stop_strings(capsys):
    (text,) = generate.main([*ASK, "--beams", "3"])
    assert [text] == generate.main([*ASK, "--beams", "3", "--no-cache"])
    assert generate.main([*ASK, "--beams", "1"]) == generate.main(ASK)
    middle = text[len(text) // 2 :][:4]
    cut = text[: text.index(middle)]
    assert generate.main([*ASK, "--beams", "3", "--stop", middle]) == [cut]
    assert capsys.readouterr().out.endswith(f"Nora{cut}\n")


@pytest.mark.parametrize("flags", [["--temperature", "1"], ["--explain"],
                                   ["--repetition-penalty", "1.5"]])  # fmt: skip
def test_beams_go_with_no_draw(flags):
    with pytest.raises(UserError, match="--beams"):
        generate.main([*ASK, "--beams", "2", *flags])


@pytest.mark.parametrize("sampling", [
    Sampling(0.7, top_k=20, top_p=0.8, min_p=0.1), Sampling(1.5, min_p=0.3),
    Sampling(1.0, top_p=0.5), Sampling(1.0), Sampling(0.02, top_k=90), Sampling(0.02, min_p=0.0),
])  # fmt: skip
def test_what_no_filter_removed_is_what_can_be_drawn(sampling):
    logits = torch.randn(100) * 2
    removed = removed_by(logits, sampling)
    gone = [token for tokens in removed.values() for token in tokens]
    ids, weights = candidates(logits[None], sampling)
    assert len(gone) == len(set(gone))  # each by one filter
    assert set(range(100)) - set(gone) == set(ids[0, weights[0] > 0].tolist())


def test_what_a_low_temperature_leaves_nothing_is_not_blamed_on_a_filter():
    removed = removed_by(torch.linspace(0, 10, 100), Sampling(0.05, top_k=90))
    assert removed["top-k 90"] == [] and len(removed["temperature 0.05"]) > 10


def test_greedy_removes_all_but_the_best():
    logits = torch.randn(10)
    (gone,) = removed_by(logits, Sampling()).values()
    assert set(range(10)) - set(gone) == {int(logits.argmax())}


def test_the_shares_shown_are_those_of_the_draw_after_the_penalty(tokenizer):
    logits, seen, sampling = torch.randn(2048), [5, 6, 7], Sampling(0.8, 4, None, 1.7)
    logits[6] = 9.0
    text = explain(tokenizer, seen, logits, sampling, 6, 4)
    penalized = penalize_repetition(logits[None], torch.tensor([seen]), None, 1.7)
    ids, weights = candidates(penalized, sampling)
    share = float(weights[ids == 6])
    first = text.splitlines()[1]
    assert f"{float(logits.softmax(-1)[6]):.2%}" in first and f"{share:.2%}" in first
    assert "chosen, penalty 1.7" in first


def test_the_end_of_a_text_has_no_penalty_to_explain(bpe):
    logits, eos = torch.zeros(300), bpe.eos_id  # which begins GPT-2's texts too
    logits[eos] = 2.0
    text = explain(bpe, [eos, 40], logits, Sampling(repetition_penalty=3.0), eos, 3)
    assert text.splitlines()[1].endswith("chosen")
