"""Text to continue: a line is given and the lines that follow are the response, or a file of
prompts with their completions.

The text is split by place, not by line (the first 80 % train, the next 10 % validate, the rest
test), because the lines of one scene know each other.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

from minillm.data.samples import (
    Sample,
    Splits,
    make_samples,
    read_rows,
    read_splits,
    split_by_place,
    stand_in_size,
    stand_in_splits,
    text_field,
)
from minillm.data.templates import Template
from minillm.data.tinyworld import stories
from minillm.errors import UserError
from minillm.files import read_text

LINES = 8  # of a passage: one to begin with, seven to write


def read_passages(
    path: str | Path, template: Template, bad: list[str] | None = None
) -> Splits:
    """From a plain text file, such as Shakespeare's works: every eighth line begins a passage.

    A speaker's name alone on its line (`HAMLET:`) begins none; it belongs to what follows.
    Errors: UserError for a text too short to split.
    """
    samples = [_passage(lines, template) for lines in _passages(read_text(Path(path)))]
    parts = split_by_place(samples)
    if not all(parts):
        raise UserError(f"{path}: {len(samples)} passages are too few to split; give more text")
    return Splits(*parts)


def _passages(text: str) -> Iterable[list[str]]:
    lines = [line.rstrip() for line in text.strip().split("\n")]
    names = {i for i, line in enumerate(lines) if _is_name(lines, i)}
    spoken = [i for i, line in enumerate(lines) if line and i not in names]
    starts = [*spoken[::LINES], len(lines)]
    for start, end in zip(starts, starts[1:], strict=False):
        yield lines[start:end]


def _passage(lines: list[str], template: Template) -> Sample:
    end = len(lines)
    while end > 1 and (not lines[end - 1] or _is_name(lines, end - 1)):
        end -= 1  # a name whose speech is the next passage's
    response = "\n" + "\n".join(lines[1:end])
    return Sample(template.fill(text=lines[0].strip()), response, row="\n".join(lines))


def _is_name(lines: list[str], i: int) -> bool:
    return lines[i].endswith(":") and (i == 0 or not lines[i - 1])


def read_completions(
    path: str | Path, template: Template, bad: list[str] | None = None
) -> Splits:
    """From a folder with train, validation and test.jsonl, or one JSONL file (prompt, completion),
    of which a tenth each is held out by a hash of the row. The completion is taken as it is: one
    that follows after a space begins with it. Errors: UserError naming file, line and field."""

    def read(file: Path) -> list[Sample]:
        return make_samples(read_rows(file), make, bad)

    def make(row: object, where: str) -> Sample:
        asked, told = (text_field(row, name, where) for name in ("prompt", "completion"))
        return Sample(template.fill(prompt=asked), told, row=asked)

    return read_splits(path, read, ["jsonl"])


def tinyworld_completions(n_train: int, n_held_out: int, template: Template) -> Splits:
    """Tinyworld's stories, the first sentence as the prompt."""
    return _stories(n_train, n_held_out, lambda text: template.fill(prompt=text))


def tinyworld_passages(n_train: int, n_held_out: int, template: Template) -> Splits:
    """Tinyworld's stories of a seed of their own: the first sentence is given."""
    return _stories(n_train, n_held_out, lambda text: template.fill(text=text))


def _stories(n_train: int, n_held_out: int, ask: Callable[[str], str]) -> Splits:
    samples = []
    for story in islice(stories(seed=3), stand_in_size(n_train, n_held_out)):
        first, _, rest = story.text.partition(". ")
        samples.append(Sample(ask(f"{first}."), f" {rest}", row=story.text))
    return stand_in_splits(samples, n_train, n_held_out)
