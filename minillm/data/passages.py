"""Text to continue: a line is given and the lines that follow are the response, or a file of
prompts with their completions.

The text is split by place, not by line (about the first 80 % train, the next 10 % validate, the
rest test), because the lines of one scene know each other; between plays if one ends near there.
"""

import math
from collections.abc import Callable, Iterable
from itertools import islice, pairwise
from pathlib import Path

from minillm.data.samples import (
    Sample,
    Splits,
    read_splits,
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
    lines = [line.rstrip() for line in read_text(Path(path)).strip().split("\n")]
    first, second = _border(lines, 0.8, 0.06), _border(lines, 0.9, 0.015)
    parts = [[_passage(passage, template) for passage in _passages(part)]
             for part in (lines[:first], lines[first:second], lines[second:])]  # fmt: skip
    # of a part's last line alone nothing follows
    parts = [[sample for sample in part if sample.response.strip()] for part in parts]
    if not all(parts):
        n = sum(len(part) for part in parts)
        raise UserError(f"{path}: {n} passages are too few to split; give more text")
    return Splits(*parts)


def _border(lines: list[str], share: float, reach: float) -> int:
    """The line where that share of them ends or, within `reach` of it, the speech that parts the
    speakers best: the fewest are heard both in the 3 % of all speeches before it and in the 3 %
    from it on. Where a play ends there, that is its end, else a scene's."""
    aim = round(share * len(lines))
    speeches = [i for i in range(len(lines)) if _is_name(lines, i)]
    speakers = [lines[i] for i in speeches]
    window = math.ceil(0.03 * len(speeches))

    def on_both_sides(n: int) -> int:
        return len({*speakers[max(0, n - window) : n]} & {*speakers[n : n + window]})

    near = [n for n, i in enumerate(speeches) if abs(i - aim) <= reach * len(lines)]
    best = min(near, key=lambda n: (on_both_sides(n), abs(speeches[n] - aim)), default=None)
    return aim if best is None else speeches[best]


def _passages(lines: list[str]) -> Iterable[list[str]]:
    names = {i for i in range(len(lines)) if _is_name(lines, i)}
    spoken = [i for i, line in enumerate(lines) if line and i not in names]
    for start, end in pairwise([*spoken[::LINES], len(lines)]):
        yield lines[start:end]


def _passage(lines: list[str], template: Template) -> Sample:
    end = len(lines)
    while end > 1 and (not lines[end - 1] or _is_name(lines, end - 1)):
        end -= 1  # a name whose speech is the next passage's
    response = "\n" + "\n".join(lines[1:end])
    return Sample(template.fill(text=lines[0].strip()), response, row="\n".join(lines))


def _is_name(lines: list[str], i: int) -> bool:
    """A line `HAMLET:` after an empty one."""
    return lines[i].endswith(":") and (i == 0 or not lines[i - 1])


def read_completions(
    path: str | Path, template: Template, bad: list[str] | None = None
) -> Splits:
    """From a folder with train, validation and test.jsonl, or one JSONL file (prompt, completion),
    of which a tenth each is held out by a hash of the row. The completion is taken as it is: one
    that follows after a space begins with it, or the prompt ends with it. Errors: UserError naming
    file, line and field."""

    def make(row: object, where: str) -> Sample:
        asked, told = (text_field(row, name, where) for name in ("prompt", "completion"))
        filled = template.fill(prompt=asked)
        is_cut = filled.endswith(asked.rstrip(" ")) and not filled.endswith(asked)
        if is_cut and not told.startswith(" "):  # the prompt's last spaces were left out
            told = asked[len(asked.rstrip(" ")) :] + told
        return Sample(filled, told, row=asked)

    return read_splits(path, make, bad)


def tinyworld_completions(n_train: int, n_held_out: int, template: Template) -> Splits:
    """Tinyworld's stories, the first sentence as the prompt."""
    return _stories(n_train, n_held_out, lambda text: template.fill(prompt=text))


def tinyworld_passages(n_train: int, n_held_out: int, template: Template) -> Splits:
    """Tinyworld's stories of a seed of their own: the first sentence is given."""
    return _stories(n_train, n_held_out, lambda text: template.fill(text=text))


def _stories(n_train: int, n_held_out: int, ask: Callable[[str], str]) -> Splits:
    def make(story: object) -> Sample:
        first, _, rest = story.text.partition(". ")
        return Sample(ask(f"{first}."), f" {rest}", row=story.text)

    return stand_in_splits(lambda n: islice(stories(seed=3), n), make, n_train, n_held_out)
