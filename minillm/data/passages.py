"""Plain text to continue: a line is given, the lines that follow it are the response.

The text is split by place, not by line (the first 80 % train, the next 10 % validate, the rest
test), because the lines of one scene know each other.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from minillm.data.samples import Sample, Splits
from minillm.data.templates import Template
from minillm.data.tinyworld import stories
from minillm.errors import UserError
from minillm.files import read_text

LINES = 8  # of a passage: one to begin with, seven to write


def read_passages(path: str | Path, template: Template) -> Splits:
    """From a plain text file, such as Shakespeare's works: every eighth line begins a passage.

    A speaker's name alone on its line (`HAMLET:`) begins none; it belongs to what follows.
    Errors: UserError for a text too short to split.
    """
    samples = [_passage(lines, template) for lines in _passages(read_text(Path(path)))]
    cuts = [0, round(0.8 * len(samples)), round(0.9 * len(samples)), len(samples)]
    parts = [samples[low:high] for low, high in zip(cuts, cuts[1:], strict=False)]
    if not all(parts):
        raise UserError(f"{path}: {len(samples)} passages are too few to split; give more text")
    return Splits(*parts)


def _passages(text: str) -> Iterable[list[str]]:
    lines = [line.rstrip() for line in text.strip().split("\n")]
    spoken = [i for i, line in enumerate(lines) if line and not line.endswith(":")]
    starts = [*spoken[::LINES], len(lines)]
    for start, end in zip(starts, starts[1:], strict=False):
        yield lines[start:end]


def _passage(lines: list[str], template: Template) -> Sample:
    while len(lines) > 1 and (not lines[-1] or lines[-1].endswith(":")):
        lines = lines[:-1]  # a name whose speech is the next passage's
    response = "\n" + "\n".join(lines[1:])
    return Sample(template.fill(text=lines[0].strip()), response, row="\n".join(lines))


def tinyworld_passages(n_train: int, n_held_out: int, template: Template) -> Splits:
    """Tinyworld's stories of a seed of their own: the first sentence is given."""
    n_test = max(n_held_out, 200)
    samples = []
    for story in islice(stories(seed=3), n_test + n_train + n_held_out):
        first, _, rest = story.text.partition(". ")
        samples.append(Sample(template.fill(text=f"{first}."), f" {rest}", row=story.text))
    test, rest = samples[:n_test], samples[n_test:]
    return Splits(rest[:n_train], rest[n_train:], test)
