"""Rotten Tomatoes from its files: the standard split, both forms, and every bad row named."""

import json

import pytest

from minillm.data.rotten_tomatoes import LABELS, read_rotten_tomatoes, tinyworld_reviews
from minillm.data.templates import TEMPLATES, Template
from minillm.errors import UserError
from tests.conftest import shared

SHORT = TEMPLATES["reviews-short"]


def test_the_original_files_give_the_standard_split():
    folder = shared("rt-polarity.pos").parent
    splits = read_rotten_tomatoes(folder, SHORT)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [8530, 1066, 1066]
    positive = [s for s in splits.train if s.label == 1]
    lines = (folder / "rt-polarity.pos").read_text().splitlines()
    assert len(positive) == 4265 and positive[0].row == lines[0].strip()
    last = [s for s in splits.test if s.label == 1][-1]
    assert last.row == lines[-1].strip()


def test_each_split_has_as_many_of_each_label():
    for split in vars(tinyworld_reviews(1, 1, SHORT)).values():
        assert sum(s.label for s in split) * 2 == len(split)


def test_no_review_of_tinyworld_is_in_two_splits():
    splits = tinyworld_reviews(1, 1, SHORT)
    rows = [{s.row for s in split} for split in vars(splits).values()]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]


def test_the_answer_is_the_label_word_with_its_space_and_the_prompt_ends_without():
    template = Template("mine", "{text} It is ")
    sample = tinyworld_reviews(1, 1, template).train[0]
    assert sample.prompt.endswith("It is") and sample.response == f" {LABELS[sample.label]}"


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_first_samples_have_the_files_own_shares_of_labels(tmp_path):
    rows = [{"text": f"film {i}", "label": int(i < 18)} for i in range(20)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labels = [s.label for s in read_rotten_tomatoes(tmp_path, SHORT).train]
    assert sum(labels) == 18 and sum(labels[:10]) == 9


def test_three_jsonl_files_are_the_three_splits(tmp_path):
    for name, n in (("train", 4), ("validation", 2), ("test", 3)):
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}", "label": i % 2}
                                           for i in range(n)])  # fmt: skip
    splits = read_rotten_tomatoes(tmp_path, SHORT)
    assert [len(s) for s in vars(splits).values()] == [4, 2, 3]


def test_one_jsonl_file_is_split_by_its_rows(tmp_path):
    rows = [{"text": f"film {i}", "label": ("negative", "positive")[i % 2]} for i in range(400)]
    write(tmp_path / "all.jsonl", rows)
    splits = read_rotten_tomatoes(tmp_path / "all.jsonl", SHORT)
    sizes = [len(s) for s in vars(splits).values()]
    assert sum(sizes) == 400 and 20 < sizes[1] < 70 and 20 < sizes[2] < 70
    write(tmp_path / "all.jsonl", rows[::-1])
    again = read_rotten_tomatoes(tmp_path / "all.jsonl", TEMPLATES["reviews"])
    assert {s.row for s in again.test} == {s.row for s in splits.test}


def test_latin_1_files_are_read(tmp_path):
    for name in ("rt-polarity.pos", "rt-polarity.neg"):
        (tmp_path / name).write_bytes(b"a caf\xe9 \n" * 10)
    assert read_rotten_tomatoes(tmp_path, SHORT).train[0].row == "a café"


@pytest.mark.parametrize("missing", ["rt-polarity.pos", "rt-polarity.neg"])
def test_one_of_the_two_files_alone_is_not_enough(tmp_path, missing):
    for name in {"rt-polarity.pos", "rt-polarity.neg"} - {missing}:
        (tmp_path / name).write_text("good\n" * 10)
    with pytest.raises(UserError, match=missing):
        read_rotten_tomatoes(tmp_path, SHORT)


def test_a_missing_split_file_is_named(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match=r"validation\.jsonl: no such file"):
        read_rotten_tomatoes(tmp_path, SHORT)
    with pytest.raises(UserError, match="neither"):
        read_rotten_tomatoes(tmp_path.parent, SHORT)


@pytest.mark.parametrize("label", [2, -1, "good", None, True, 1.0])
def test_a_label_outside_the_set_is_named_with_its_line(tmp_path, label):
    write(tmp_path / "x.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": label}])
    with pytest.raises(UserError, match=r"x\.jsonl:2: label"):
        read_rotten_tomatoes(tmp_path / "x.jsonl", SHORT)
