"""From files to batches: prompts, labels by length, the split, and every bad row named."""

import json

import pytest
import torch

from llama import LlamaTokenizer
from minillm.data.alpaca import read_alpaca
from minillm.data.batches import Batches, Row, collate, encode_samples
from minillm.data.preferences import PairBatches, read_preferences
from minillm.data.samples import Sample, split_by_hash
from minillm.data.templates import TEMPLATES, find_template
from minillm.errors import UserError
from tests.conftest import ragged_rows, shared

ALPACA = TEMPLATES["alpaca"]


def test_the_official_prompt_with_and_without_input():
    assert ALPACA.fill(instruction="Add.", input="1 2").endswith(
        "the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    assert ALPACA.fill(instruction="Add.").endswith(
        "the request.\n\n### Instruction:\nAdd.\n\n### Response:"
    )
    assert "paired with an input" in ALPACA.fill(instruction="a", input="b")
    assert "paired with an input" not in ALPACA.fill(instruction="a")


def test_braces_in_the_users_text_are_text():
    prompt = ALPACA.fill(
        instruction="Fill in {input} and {instruction}", input="{instruction}"
    )
    assert "Fill in {input} and {instruction}\n" in prompt
    assert "### Input:\n{instruction}\n" in prompt


def test_real_alpaca_has_its_known_token_counts():
    """Prompt and response apart: as many tokens as the rows have, EOS supervised once a row."""
    tokenizer = LlamaTokenizer(shared("llama2_tokenizer.model"))
    samples = read_alpaca(shared("alpaca_200.json"), ALPACA)
    encoded = encode_samples(samples, tokenizer, 512)
    assert len(encoded.rows) == 200 and encoded.dropped == 0 and encoded.truncated == 0
    for sample, row in zip(samples, encoded.rows, strict=True):
        prompt = tokenizer.encode(sample.prompt, bos=True)
        assert row.tokens[: len(prompt)].tolist() == prompt  # training asks as generation does
        assert (row.labels[: len(prompt)] == -100).all()
        assert torch.equal(row.labels[len(prompt) :], row.tokens[len(prompt) :])
        assert row.labels[-1] == tokenizer.eos_id
        assert (row.labels == tokenizer.eos_id).sum() == 1
    supervised = sum(int((row.labels != -100).sum()) for row in encoded.rows)
    assert abs(supervised - 11_238) < 10  # the course's count, which encodes the two jointly


@pytest.mark.parametrize("template", [*TEMPLATES])
def test_the_border_of_prompt_and_response_is_exact_for_every_template(tokenizer, template):
    prompt = TEMPLATES[template].fill(instruction="Who is Nora?", input="A list", text="Dull.")
    sample = Sample(prompt, "The baker.")
    (row,) = encode_samples([sample], tokenizer, 512).rows
    supervised = row.tokens[row.labels != -100]
    assert tokenizer.decode(supervised.tolist()) == "The baker."
    assert tokenizer.decode(row.tokens[row.labels == -100].tolist()) == sample.prompt


def test_too_long_a_response_is_cut_without_eos_and_counted(tokenizer):
    sample = Sample("Say it.", "word " * 50)
    encoded = encode_samples([sample], tokenizer, 20)
    assert encoded.truncated == 1 and len(encoded.rows[0].tokens) == 20
    assert tokenizer.eos_id not in encoded.rows[0].tokens


def test_a_prompt_that_fills_the_window_is_dropped_and_counted(tokenizer):
    samples = [Sample("word " * 50, "yes"), Sample("Say.", "")]
    encoded = encode_samples(samples, tokenizer, 20)
    assert encoded.dropped == 1 and len(encoded.rows) == 1
    assert "1 dropped" in encoded.summary()
    assert encoded.rows[0].labels[-1] == tokenizer.eos_id  # an empty answer still ends


@pytest.mark.parametrize("text", ["<s>", "</s>", "<|endoftext|>", "[INST]", "<unk>"])
def test_text_that_looks_like_a_control_token_is_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == text


def test_alpaca_json_and_jsonl_give_the_same_samples(tmp_path):
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "é", "output": "d"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    lines = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\n"
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    assert read_alpaca(tmp_path / "x.json", ALPACA) == read_alpaca(tmp_path / "x.jsonl", ALPACA)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n\n  \n", "no samples"),
        (b"[]", "no samples"),
        (b'{"instruction": "a", "output": "b"}\n{"instruction": "a", "outp', r":2: broken JSON"),
        (b'[{"instruction": "a",\n "output": }]', r":2: broken JSON"),
        (b'{"instruction": "a"}', "no field 'output'"),
        (b'{"instruction": "a", "output": 3}', "'output' is no string"),
        (b"[1, 2]", "row 1"),
        (b'{"instruction": "\\ud800", "output": "b"}', ":1: 'instruction' holds half a character"),
        (b'{"instruction": "a", "output": "\xff"}', ":1: not UTF-8"),
        (b"[" * 100_000, "nested"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS"),
    ],
)
def test_bad_data_is_named_with_its_file_and_line(tmp_path, content, message):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_alpaca(path, ALPACA)
    assert str(error.value).startswith(str(path))


def test_the_split_follows_the_rows_not_their_order():
    samples = [Sample(f"q{i}", f"a{i}") for i in range(300)]
    train, held_out = split_by_hash(samples)
    again, same = split_by_hash(samples[::-1])
    assert set(train) == set(again) and set(held_out) == set(same)
    assert not set(train) & set(held_out) and 15 < len(held_out) < 50


def test_equal_rows_land_on_the_same_side():
    repeated = [Sample("q", "a")] * 5
    train, held_out = split_by_hash(repeated + [Sample(f"{i}", "") for i in range(90)])
    assert not set(train) & set(held_out)


def test_answers_to_one_question_land_on_the_same_side_whatever_the_order():
    samples = [Sample(f"q{i // 3}", f"a{i}") for i in range(300)]
    train, held_out = split_by_hash(samples)
    assert not {s.prompt for s in train} & {s.prompt for s in held_out} and len(held_out) == 30
    again, same = split_by_hash(samples[::-1])
    assert set(train) == set(again) and set(held_out) == set(same)


def test_pairs_of_one_prompt_land_on_the_same_side(tmp_path):
    rows = [{"prompt": f"q{i // 2}", "chosen": f"a{i}", "rejected": "b"} for i in range(100)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = read_preferences(tmp_path / "x.jsonl", TEMPLATES["plain"])
    sides = [{s.row["prompt"] for s in side} for side in vars(splits).values()]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


@pytest.mark.parametrize("rest", [
    [],  # the only question of a file is none
    [Sample("", f"b{i}") for i in range(299)], [Sample("t", f"b{i}", row="") for i in range(299)],
    [Sample("t", f"b{i}", row={"prompt": "", "chosen": f"b{i}"}) for i in range(299)],
])  # fmt: skip
def test_answers_to_no_question_are_split_one_by_one(rest):
    train, held_out = split_by_hash([Sample("Tell a story.", f"a{i}") for i in range(300)] + rest)
    assert 15 < sum(s.prompt == "Tell a story." for s in held_out) < 50
    assert not rest or 15 < sum(s in rest for s in held_out) < 50
    assert len(train) + len(held_out) == 300 + len(rest)


@pytest.mark.parametrize("word", ["a", "b", "c", "d"])
def test_a_few_phrases_that_all_rows_share_are_no_questions(word):
    samples = [Sample(f"{word}{i % 5 if i % 20 else i}", f"a{i}") for i in range(1000)]
    train, held_out = split_by_hash(samples)
    assert 60 < len(held_out) < 140 and {s.prompt for s in held_out if len(s.prompt) == 2}


@pytest.mark.parametrize("word", ["a", "b", "c", "d"])
def test_questions_of_any_size_leave_about_a_tenth(word):
    sizes = [1, 1, 2, 3, 5, 8, 13, 21, 34, 34] * 4
    samples = [Sample(f"{word}{q}", f"a{i}") for q, size in enumerate(sizes) for i in range(size)]
    train, held_out = split_by_hash(samples)
    assert not {s.prompt for s in train} & {s.prompt for s in held_out}
    assert 0.05 * len(samples) < len(held_out) < 0.15 * len(samples)


def test_rows_without_a_prompt_stay_on_their_side_under_another_template():
    sides = []
    for text in ("", "Text:"):
        _, held_out = split_by_hash([Sample(text, f"a{i}", row="") for i in range(100)])
        sides.append({sample.response for sample in held_out})
    assert sides[0] == sides[1]


def test_a_split_of_one_sample_is_refused():
    with pytest.raises(UserError, match="too few"):
        split_by_hash([Sample("q", "a")])


def test_an_unknown_template_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="alpaca"):
        find_template("vicuna")


def test_what_may_be_cut_is_found_beside_any_other_field():
    prompt, body = TEMPLATES["tldr"].fill_around("post", "BODY", title="x\0y", subreddit="a")
    assert prompt[body.start : body.end] == "BODY"


@pytest.mark.parametrize("content", ['{"name": "a"}', '{"text": 3}', "[]", '{"text": "no place"}'])
def test_a_template_file_without_a_place_for_the_question_is_refused(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match="t.json"):
        find_template(str(tmp_path / "t.json"), "instruction")


def test_another_template_moves_no_sample_to_the_other_side(tmp_path):
    rows = [{"instruction": f"q{i}", "output": "a"} for i in range(100)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    sides = [split_by_hash(read_alpaca(tmp_path / "x.json", TEMPLATES[t]))
             for t in ("alpaca", "plain")]  # fmt: skip
    held_out = [[sample.row for sample in side] for _, side in sides]
    assert held_out[0] == held_out[1]


def rows_of(n: int) -> list[Row]:
    return [Row(torch.full((i % 5 + 1,), i), torch.full((i % 5 + 1,), i)) for i in range(n)]


def test_every_row_appears_once_an_epoch_in_an_order_of_seed_and_epoch():
    batches = Batches(rows_of(11), 2, 0, seed=3)

    def ids(epoch: int) -> list[int]:
        groups = range(epoch * 3, epoch * 3 + 3)
        return [int(t[0]) for g in groups for b in batches.group(g, 2) for t in b.tokens]

    assert sorted(ids(0)) == sorted(ids(1)) == list(range(11))
    assert ids(0) != ids(1) and ids(0) != Batches(rows_of(11), 2, 0, seed=4).order(0)
    assert batches.groups_per_epoch(2) == 3 and len(batches.group(2, 2)) == 2


def test_collate_pads_on_the_right_without_labels():
    batch = collate(rows_of(3), pad_id=9)
    assert batch.tokens.tolist() == [r + [9] * (17 - len(r)) for r in ([0], [1, 1], [2, 2, 2])]
    assert batch.labels.tolist() == [r + [-100] * (17 - len(r)) for r in ([0], [1, 1], [2, 2, 2])]
    assert batch.lengths.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("length", "columns"), [(1, 1), (2, 17), (17, 17), (18, 33)])
def test_what_the_model_is_fed_is_a_multiple_of_16(length, columns):
    row = Row(torch.arange(length), torch.arange(length))
    assert collate([row], 0).tokens.shape == (1, columns)
    assert collate([row], 0, context=20).tokens.shape == (1, min(columns, 21))


@pytest.mark.parametrize("seed", range(9))
def test_no_epoch_holds_more_than_the_largest_micro_batch(seed):
    """The longest row may stand in the short last micro-batch of the first epoch."""
    rows = [Row(t, t) for t in (torch.arange(n) for n in [10] * 8 + [99])]
    batches = Batches(rows, 8, 0, seed)
    every = [batch.tokens.numel() for epoch in range(12) for batch in batches.group(epoch, 2)]
    assert batches.largest().tokens.numel() == max(every)


@pytest.mark.parametrize("kind", [Batches, PairBatches])
def test_any_whole_seed_gives_an_order(kind):
    rows = rows_of(6)
    orders = [kind(rows, 2, 0, seed).order(1) for seed in (20260101120000, 2**53)]
    assert all(sorted(order) == [*range(6)] for order in orders)


def test_the_largest_micro_batch_is_one_of_the_first_epochs():
    batches = Batches(rows_of(11), 3, 0, seed=3)
    largest = batches.largest()
    sizes = [batch.tokens.numel() for batch in batches]
    assert largest.tokens.numel() == max(sizes)
    assert any(torch.equal(largest.tokens, batch.tokens) for batch in batches)


def test_a_response_that_just_fits_is_not_truncated(tokenizer):
    samples = [Sample("Say it.", " yes")]
    n = len(encode_samples(samples, tokenizer, 100).rows[0].tokens)
    assert [encode_samples(samples, tokenizer, size).truncated for size in (n, n - 1)] == [0, 1]


def test_the_epochs_of_neighbouring_seeds_have_no_order_in_common():
    rows = ragged_rows(30)
    orders = {tuple(Batches(rows, 2, 0, seed).order(epoch)) for seed in range(3)
              for epoch in range(3)}  # fmt: skip
    assert len(orders) == 9


def test_of_equally_large_micro_batches_the_largest_has_the_most_labels():
    rows = [Row(row.tokens, row.labels.clone()) for row in ragged_rows(1) * 4]
    rows[2].labels[:] = rows[2].tokens
    largest = Batches(rows, 1, 0).largest()
    assert int((largest.labels[:, 1:] != -100).sum()) == rows[2].n_labels
