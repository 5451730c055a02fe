"""tools/generate.py and chat.py: every flag does what the library does, a text ends at its stop
string, and --explain shows the numbers of the draw."""

import ast
import re
from dataclasses import fields

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from llama import Llama, load_llama
from minillm import beam_search
from minillm import generate as library_generate
from minillm.data.templates import find_template
from minillm.errors import UserError
from minillm.sampling import Sampling, candidates, penalize_repetition
from tests.conftest import TINY_LLAMA
from tools import chat, generate
from tools.explain import explain, removed_by
from tools.models import ModelOptions, Stopwatch, find_model, load_model

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


@pytest.mark.parametrize(("flags", "told"), [
    (["--top-p", "0.9", "--seed", "3"], "--top-p, --seed: no effect at --temperature 0"),
    (["--top-k", "0"], "--top-k: no effect"), (["--min-p", "0.1"], "--min-p: no effect"),
    (["--length-penalty", "2"], "--length-penalty: no effect without --beams"),
    (["--input", "a hen"], "--input: no effect without a template that has a place"),
    (["--input", "a hen", "--template", "reviews-short"], "--input: no effect without a template"),
    (["--samples", "2", "--beams", "2"], "--samples: these are all the same; leave it out"),
    (["--samples", "2"], "--samples: these are all the same; add --temperature"),
])  # fmt: skip
def test_a_flag_that_does_nothing_is_named(flags, told, capsys):
    generate.main([*ASK, "--max-new-tokens", "1", "--layers", "1", *flags])
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {told}") and err.count("warning") == 1


@pytest.mark.parametrize("flags", [
    ["--top-p", "0.9", "--seed", "3", "--temperature", "1"], ["--repetition-penalty", "1.2"],
    ["--length-penalty", "2", "--beams", "2"], ["--input", "a hen", "--template", "alpaca"],
    ["--samples", "2", "--temperature", "1"],
])  # fmt: skip
def test_a_flag_that_does_something_is_not_named(flags, capsys):
    generate.main([*ASK, "--max-new-tokens", "1", "--layers", "1", *flags])
    assert "warning" not in capsys.readouterr().err


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


def test_how_much_was_removed_is_told_by_the_models_own_probability(tokenizer):
    logits = torch.randn(2048) * 2
    told = explain(tokenizer, [5], logits, Sampling(2.0, top_k=3), 0, 2).splitlines()[-1]
    own = logits.softmax(-1).topk(3).values.sum()
    assert f"top-k 3 removed 2,045 tokens worth {float(1 - own):.2%}; 3 left" in told


def test_it_draws_what_the_library_draws_from_the_same_seed(capsys):
    model, tokenizer = load_llama(TINY_LLAMA)
    prompts = ["One morning, Nora", "The"]
    flags = [part for prompt in prompts for part in ("--prompt", prompt)]
    texts = generate.main([*flags, "--samples", "2", "--max-new-tokens", "12", "--temperature",
                           "0.9", "--top-k", "50", "--seed", "7"])  # fmt: skip
    rows = [tokenizer.encode(p, bos=True) for p in prompts for _ in range(2)]
    new = library_generate(model.eval(), rows, 12, temperature=0.9, top_k=50, seed=7,
                           eos_id=tokenizer.eos_id)  # fmt: skip
    assert texts == [tokenizer.decode([*row, *tail])[len(tokenizer.decode(row)) :]
                     for row, tail in zip(rows, new, strict=True)]  # fmt: skip
    out = capsys.readouterr().out
    titles = ["=== 1-1 ===", "=== 1-2 ===", "=== 2-1 ===", "=== 2-2 ==="]
    shown = [prompt for prompt in prompts for _ in range(2)]
    for title, prompt, text in zip(titles, shown, texts, strict=True):
        assert f"{title}\n{prompt}{text}\n" in out
    n = sum(map(len, rows))
    assert f"prefill {n} tokens" in out and f"decode {sum(map(len, new)) - 4} tokens" in out


def test_the_length_penalty_is_the_one_asked_for():
    model, tokenizer = load_llama(TINY_LLAMA)
    tokens = tokenizer.encode("One morning, Nora", bos=True)
    texts = []
    for penalty in (0.0, 4.0):
        texts += generate.main([*ASK, "--beams", "3", "--length-penalty", str(penalty)])
        (want,) = beam_search(model.eval(), [tokens], 40, 3, True, penalty, tokenizer.eos_id)
        want = [token for token in want if token != tokenizer.eos_id]
        assert texts[-1] == tokenizer.decode([*tokens, *want])[len(ASK[1]) :]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(("flag", "columns"), [("--cache", 1), ("--no-cache", None)])
def test_without_the_cache_every_step_computes_the_whole_text(flag, columns):
    seen = []

    def watch(module, args):
        if isinstance(module, Llama):
            seen.append(args[0].size(1))

    handle = register_module_forward_pre_hook(watch)
    generate.main([*ASK[:2], "--max-new-tokens", "4", flag])
    handle.remove()
    assert seen == [seen[0], *[columns or seen[0] + i for i in (1, 2, 3)]]


def test_the_input_of_an_instruction_is_part_of_the_prompt():
    flags = ["--template", "alpaca", "--max-new-tokens", "12", "--prompt", "Where does she live?"]
    whole = find_template("alpaca").ask("Where does she live?", "Nora is a hen.")
    bare = ["--template", "none", "--max-new-tokens", "12", "--prompt", whole]
    given = generate.main([*flags, "--input", "Nora is a hen."])
    assert given == generate.main(bare) != generate.main(flags)


def test_prompts_of_a_file_come_after_those_given(tmp_path):
    (tmp_path / "prompts.txt").write_text("b\n\n c\r\n")
    assert generate.collect_prompts(["a"], str(tmp_path / "prompts.txt")) == ["a", "b", " c"]


def test_a_text_that_ended_by_itself_is_not_told_to_have_met_the_context(capsys):
    long = [*ASK[:2], "--max-new-tokens", "600"]
    (text,) = generate.main([*long, "--stop", " "])
    assert "(stopped" not in capsys.readouterr().out and " " not in text


def test_tokens_per_second_are_those_of_the_first_step_and_of_the_others():
    watch = Stopwatch(torch.device("cpu"))
    for n_tokens in (4, 3, 2):
        watch.mark(n_tokens)
    watch.marks = [0.0, 2.0, 3.0, 4.5]
    told = watch.summary(10)
    assert told == "prefill 10 tokens, 5 tokens/s; decode 5 tokens, 2 tokens/s"


def options(**changes) -> ModelOptions:
    plain = {field.name: None for field in fields(ModelOptions)}
    return ModelOptions(**plain | {"device": "cpu", "force": False, "attention": "sdpa"} | changes)


def test_a_model_is_loaded_in_the_precision_and_with_the_attention_asked_for():
    model, _, _ = load_model(options(precision="bf16", attention="explicit", layers=2))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.attention == "explicit" and len(model.blocks) == 2
    plain, _, _ = load_model(options(layers=1))
    assert {p.dtype for p in plain.parameters()} == {torch.float32}


def test_layers_asked_for_come_before_those_that_an_adapter_notes(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "minillm.json").write_text('{"base": "tiny-llama", "layers": 1}')
    assert find_model(None, str(tmp_path), None)[1] == 1
    assert find_model(None, str(tmp_path), 3)[1] == 3


def test_a_line_break_in_a_stop_string_is_written_as_in_code():
    assert generate.parse_args(["--stop", r"\n\n", "--stop", "."]).stop == ["\n\n", "."]


def test_every_line_of_a_chat_is_answered_as_a_prompt_of_its_own(monkeypatch, capsys):
    lines, how = ["Where does Nora live?", "Who is Tom?"], ["--temperature", "1", "--top-k", "40"]
    how += ["--max-new-tokens", "9", "--template", "alpaca"]
    said = iter([*lines, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    chat.main([*how, "--seed", "5"])
    out = capsys.readouterr().out
    want = [generate.main([*how, "--seed", str(5 + i), "--prompt", line])[0]
            for i, line in enumerate(lines)]  # fmt: skip
    assert out.partition("\n")[2] == "".join(f"{text}\n\n" for text in want)
