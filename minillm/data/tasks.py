"""The tasks by name: how each is read, what stands in for its files, and how it is asked."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from minillm.data.alpaca import alpaca_splits, tinyworld_instructions
from minillm.data.passages import (
    read_completions,
    read_passages,
    tinyworld_completions,
    tinyworld_passages,
)
from minillm.data.preferences import read_preferences, tinyworld_preferences
from minillm.data.rotten_tomatoes import LABELS, read_rotten_tomatoes, tinyworld_reviews
from minillm.data.samples import Splits
from minillm.data.summaries import (
    read_cnn_dailymail,
    read_tldr,
    tinyworld_articles,
    tinyworld_posts,
)
from minillm.data.templates import Template


@dataclass(frozen=True)
class Task:
    """`read` takes the official files, and a list for the faults of rows where those are to be left
    out (else the first is an error); `tinyworld` makes bundled data (at least so many samples
    to train on and held out); `field` is what a template must have a place for.

    `labels` where the answer is one of a few; `baselines` what an answer is held against, by name,
    as a function of the row's fields, where answers are summaries; `compare_with_training` where a
    text could be learnt by heart.
    """

    template: str
    field: str
    read: Callable[..., Splits]  # (path, template, bad=None), and n=None where it reads in part
    tinyworld: Callable[[int, int, Template], Splits]
    labels: tuple[str, ...] = ()
    baselines: dict[str, Callable[[dict], str]] = field(default_factory=dict)
    compare_with_training: bool = False
    has_test: bool = True
    reads_in_part: bool = False  # the first rows of a file are enough for the first samples
    answer_tokens: int = 200  # at most, where nothing else is asked for

    def splits(
        self, path: str | Path | None, template: Template, n_train: int, n_held_out: int,
        skip_bad: bool = False, n_enough: int | None = None,
    ) -> Splits:  # fmt: skip
        """The official files' samples, of each split at least the first `n_enough` (None: all), or
        tinyworld's where `path` is None. `skip_bad` leaves out broken rows, and says how many.
        Errors: UserError, naming file and line."""
        if path is None:
            return self.tinyworld(n_train, n_held_out, template)
        bad = [] if skip_bad else None
        enough = {"n": n_enough} if self.reads_in_part else {}
        found = self.read(path, template, bad, **enough)
        if bad:
            print(f"warning: {len(bad)} broken rows left out, the first: {bad[0]}", file=sys.stderr)
        return found


def sentences(text: str) -> list[str]:
    """A text's sentences: it is cut at white space after a full stop, ! or ?."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


def first(n: int, name: str) -> Callable[[dict], str]:
    """The first n sentences of a field, one a line."""
    return lambda row: "\n".join(sentences(row[name])[:n])


TASKS = {
    "alpaca": Task(
        "alpaca", "instruction", alpaca_splits, tinyworld_instructions, has_test=False
    ),
    "rotten_tomatoes": Task(
        "reviews", "text", read_rotten_tomatoes, tinyworld_reviews, LABELS, answer_tokens=5
    ),
    "cnn_dailymail": Task(
        "summary", "article", read_cnn_dailymail, tinyworld_articles,
        baselines={"lead-3": first(3, "article"), "whole article": lambda row: row["article"]},
        answer_tokens=120, reads_in_part=True,
    ),
    "tldr": Task(
        "tldr", "post", read_tldr, tinyworld_posts,
        baselines={"title": lambda row: row["title"], "lead-2": first(2, "post"),
                   "whole post": lambda row: row["post"]},
        answer_tokens=80, reads_in_part=True,
    ),
    "preferences": Task(
        "alpaca", "instruction", read_preferences, tinyworld_preferences, has_test=False
    ),
    "completion": Task("prompt", "prompt", read_completions, tinyworld_completions),
    "shakespeare": Task(
        "complete", "text", read_passages, tinyworld_passages, compare_with_training=True,
        answer_tokens=100,
    ),
}  # fmt: skip
