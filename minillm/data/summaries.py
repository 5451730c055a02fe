"""Articles and posts with their summaries: CNN/DailyMail and Reddit TL;DR, each one sequence.

The summary follows its article after a cue, with its leading space; the article is what is cut
where the two do not fit. Sources: Hermann et al. 2015; Nallapati et al. 2016; Stiennon et al. 2020.
"""

from pathlib import Path

from minillm.data.samples import (
    Sample,
    Splits,
    read_splits,
    stand_in_splits,
    text_field,
)
from minillm.data.templates import Template
from minillm.data.tinyworld import articles
from minillm.errors import UserError


def read_cnn_dailymail(
    path: str | Path, template: Template, bad: list[str] | None = None, n: int | None = None
) -> Splits:
    """From a folder with train, validation and test.csv, or one CSV file (columns article and
    highlights), of which a tenth each is held out by a hash of the row. Of each file in a folder
    the first `n` samples are enough.

    Errors: UserError naming file, line and column for a column that is missing, or empty.
    """
    return read_splits(path, lambda row, where: _article(row, template, where), bad, n, "csv")


def read_tldr(
    path: str | Path, template: Template, bad: list[str] | None = None, n: int | None = None
) -> Splits:
    """From a folder with train, valid and test.jsonl, or one JSONL file (subreddit, title, post,
    summary), of which a tenth each is held out by a hash of the row. Of each file in a folder the
    first `n` samples are enough.

    Errors: UserError naming file, line and field.
    """
    return read_splits(path, lambda row, where: _post(row, template, where), bad, n)


def _article(row: dict, template: Template, where: str) -> Sample:
    fields = {name: _filled(row, name, where) for name in ("article", "highlights")}
    prompt, body = template.fill_around("article", fields["article"])
    return Sample(prompt, f" {fields['highlights']}", row=fields, body=body)


def _post(row: dict, template: Template, where: str) -> Sample:
    asked = {name: text_field(row, name, where) for name in ("subreddit", "title")}
    post, summary = _filled(row, "post", where), _filled(row, "summary", where)
    prompt, body = template.fill_around("post", post, r"\n", **asked)
    fields = {**asked, "post": post, "summary": summary}
    return Sample(prompt, f" {summary}", row=fields, body=body)


def _filled(row: dict, field: str, where: str) -> str:
    value = text_field(row, field, where).strip()
    if not value:
        raise UserError(f"{where}: {field!r} is empty; fill it or remove the row")
    return value


def tinyworld_articles(n_train: int, n_held_out: int, template: Template) -> Splits:
    """Tinyworld's newspaper, in CNN/DailyMail's form."""
    return stand_in_splits(
        articles, lambda row: _article(row, template, "tinyworld"), n_train, n_held_out
    )


def tinyworld_posts(n_train: int, n_held_out: int, template: Template) -> Splits:
    """The same articles as posts, the first sentence of their highlights as the summary."""

    def make(row: dict) -> Sample:
        post = {"subreddit": "pebbleford", "title": " ".join(row["article"].split()[:6]),
                "post": row["article"], "summary": row["highlights"].split("\n")[0]}  # fmt: skip
        return _post(post, template, "tinyworld")

    return stand_in_splits(articles, make, n_train, n_held_out)
