"""Splits: of one file, of a folder, of a text by place, and of what tinyworld writes."""

import csv
import json
from itertools import islice

import pytest

from minillm.data.tasks import TASKS
from minillm.data.templates import TEMPLATES
from minillm.data.tinyworld import stories
from minillm.errors import UserError

SUMMARY, TLDR = TEMPLATES["summary"], TEMPLATES["tldr"]


def post(number: int) -> dict:
    return {"subreddit": "tea", "title": f"Title {number}", "post": f"Words of {number}.",
            "summary": f"Sum {number}."}  # fmt: skip


def article(number: int) -> dict:
    return {"article": f"Words of {number}.", "highlights": f"Sum {number}."}


def write(path, task: str, n: int):
    if task == "tldr":
        path.write_text("\n".join(json.dumps(post(i)) for i in range(n)))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ("article", "highlights"))
            writer.writeheader()
            writer.writerows(article(i) for i in range(n))
    return path


@pytest.mark.parametrize(("task", "name"), [("tldr", "x.jsonl"), ("cnn_dailymail", "x.csv")])
def test_one_file_is_split_the_same_however_few_samples_are_enough(task, name, tmp_path):
    kind, path = TASKS[task], write(tmp_path / name, task, 120)
    template = TEMPLATES[kind.template]
    want = kind.splits(path, template, 5, 3)
    assert kind.splits(path, template, 5, 3, n_enough=20) == want


@pytest.mark.parametrize("missing", ["train", "validation", "test"])
def test_a_folder_without_one_of_its_splits_is_refused(missing, tmp_path):
    for name in {"train", "validation", "test"} - {missing}:
        write(tmp_path / f"{name}.jsonl", "tldr", 4)
    with pytest.raises(UserError, match=rf"{missing}\.jsonl: no such file"):
        TASKS["tldr"].read(tmp_path, TLDR)


def test_a_byte_order_mark_is_no_part_of_a_csvs_first_column(tmp_path):
    path = write(tmp_path / "x.csv", "cnn_dailymail", 40)
    want = TASKS["cnn_dailymail"].read(path, SUMMARY)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert TASKS["cnn_dailymail"].read(path, SUMMARY) == want


def test_the_summary_of_a_tinyworld_post_is_one_sentence():
    posts = TASKS["tldr"].tinyworld(20, 5, TLDR).train
    articles = TASKS["cnn_dailymail"].tinyworld(20, 5, SUMMARY).train
    for told, whole in zip(posts, articles, strict=True):
        assert "\n" not in told.response
        assert told.response == whole.response.split("\n")[0]


def test_a_passage_is_never_asked_to_write_nothing_and_no_line_is_lost(tmp_path):
    """But a single one at the end of a part, which would be asked to go on with nothing."""
    lines = [f"verse {i} goes on" for i in range(8 * 100 + 1)]
    (tmp_path / "play.txt").write_text("\n".join(lines))
    splits = TASKS["shakespeare"].read(tmp_path / "play.txt", TEMPLATES["complete"])
    samples = [s for side in vars(splits).values() for s in side]
    assert all(s.response.strip() for s in samples)
    texts = [s.prompt.removesuffix(" <complete>") + s.response for s in samples]
    told = {line for text in texts for line in text.split("\n")}
    ends = {lines[round(share * len(lines)) - 1] for share in (0.8, 0.9, 1)}  # of the parts
    assert told >= {*lines} - ends
    assert sum(len(s.row.split("\n")) == 8 for s in samples) >= 97


def test_tinyworlds_passages_are_none_of_the_stories_of_pretraining():
    known = {story.text for story in islice(stories(0), 1000)}
    splits = TASKS["shakespeare"].tinyworld(200, 20, TEMPLATES["complete"])
    found = [s.row for side in vars(splits).values() for s in side]
    assert sum(row in known for row in found) < 0.02 * len(found)
