"""Articles and posts with their summaries: CNN/DailyMail and Reddit TL;DR, each one sequence.

The summary follows its article after a cue, with its leading space; the article is what is cut
where the two do not fit. Sources: Hermann et al. 2015; Nallapati et al. 2016; Stiennon et al. 2020.
"""

from pathlib import Path

from minillm.data.samples import (
    Sample,
    Splits,
    make_samples,
    read_csv_rows,
    read_rows,
    read_splits,
    stand_in_size,
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
    n = n if Path(path).is_dir() else None

    def read(file: Path) -> list[Sample]:
        rows = read_csv_rows(file)
        return make_samples(rows, lambda row, where: _article(row, template, where), bad, n)

    return read_splits(path, read, ["csv"])


def read_tldr(
    path: str | Path, template: Template, bad: list[str] | None = None, n: int | None = None
) -> Splits:
    """From a folder with train, valid and test.jsonl, or one JSONL file (subreddit, title, post,
    summary), of which a tenth each is held out by a hash of the row. Of each file in a folder the
    first `n` samples are enough.

    Errors: UserError naming file, line and field.
    """
    n = n if Path(path).is_dir() else None

    def read(file: Path) -> list[Sample]:
        rows = read_rows(file)
        return make_samples(rows, lambda row, where: _post(row, template, where), bad, n)

    return read_splits(path, read, ["jsonl"])


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
    """Tinyworld's newspaper, in CNN/DailyMail's form: as many test articles as held-out ones."""
    rows = articles(stand_in_size(n_train, n_held_out))
    samples = [_article(row, template, "tinyworld") for row in rows]
    return stand_in_splits(samples, n_train, n_held_out)


def tinyworld_posts(n_train: int, n_held_out: int, template: Template) -> Splits:
    """The same articles as posts, the first sentence of their highlights as the summary."""
    rows = articles(stand_in_size(n_train, n_held_out))
    posts = [
        {"subreddit": "pebbleford", "title": " ".join(row["article"].split()[:6]),
         "post": row["article"], "summary": row["highlights"].split("\n")[0]} for row in rows
    ]  # fmt: skip
    samples = [_post(row, template, "tinyworld") for row in posts]
    return stand_in_splits(samples, n_train, n_held_out)
