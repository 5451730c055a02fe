"""Rotten Tomatoes: is a film review positive or negative? (Pang & Lee 2005)

The answer is a word with its leading space, as it stands in running text and as one token of
GPT-2's; so a prompt ends without one.
"""

import itertools
from pathlib import Path

from minillm.data.samples import (
    Sample,
    Splits,
    read_splits,
    text_field,
)
from minillm.data.templates import Template
from minillm.data.tinyworld import reviews
from minillm.errors import UserError
from minillm.files import check_readable

LABELS = ("negative", "positive")
ORIGINAL = ("rt-polarity.neg", "rt-polarity.pos")  # by label
PER_LABEL = 5331  # reviews of each label in the original, and in tinyworld's stand-in


def read_rotten_tomatoes(
    path: str | Path, template: Template, bad: list[str] | None = None
) -> Splits:
    """From a folder with the original two files, or train/validation/test.jsonl, or from one
    JSONL file (text, label 0 or 1), of which a tenth each is held out by a hash of the row.

    Of each label's original file the first 80 % train, the next 10 % validate, the rest test:
    8,530, 1,066 and 1,066 reviews. Errors: UserError naming a missing file, a line, a label.
    """
    path = Path(path)
    if path.name in ORIGINAL:
        path = path.parent
    if any((path / name).exists() for name in ORIGINAL):
        by_label = [_read_lines(path / name) for name in ORIGINAL]
        return split_by_label(by_label, template)
    if path.is_dir() and not any(path.glob("*.jsonl")):
        raise UserError(f"{path}: neither {ORIGINAL[1]} nor train.jsonl; check the path")

    def make(row: object, where: str) -> Sample:
        return _sample(text_field(row, "text", where), _label(row, where), template)

    return read_splits(path, make, bad, arrange=alternate)


def tinyworld_reviews(n_train: int, n_held_out: int, template: Template) -> Splits:
    """Tinyworld's reviews in the numbers of the original (the sizes asked for change nothing)."""
    rows = reviews(2 * PER_LABEL)
    by_label = [[row["text"] for row in rows if row["label"] == label] for label in (0, 1)]
    return split_by_label(by_label, template)


def split_by_label(by_label: list[list[str]], template: Template) -> Splits:
    """80, 10 and 10 % of each label's texts, in their order; labels alternate within a split."""
    parts: list[list] = [[], [], []]
    for label, texts in enumerate(by_label):
        cuts = [0, round(0.8 * len(texts)), round(0.9 * len(texts)), len(texts)]
        for part, (low, high) in zip(parts, itertools.pairwise(cuts), strict=True):
            part += [_sample(text, label, template) for text in texts[low:high]]
    return Splits(*map(alternate, parts))


def alternate(samples: list[Sample]) -> list[Sample]:
    """The same samples with labels in turn, each as often as it is there, so that the first N of a
    file that lists one label after the other have both in the file's own shares."""
    placed = []
    for label in range(len(LABELS)):
        own = [sample for sample in samples if sample.label == label]
        placed += [((i + 0.5) / len(own), sample) for i, sample in enumerate(own)]
    return [sample for _, sample in sorted(placed, key=lambda pair: pair[0])]


def _sample(text: str, label: int, template: Template) -> Sample:
    return Sample(template.fill(text=text), f" {LABELS[label]}", label, row=text)


def _read_lines(path: Path) -> list[str]:
    """The lines of an original file: UTF-8, or Latin-1 as first published."""
    check_readable(path)
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
    return [line.strip() for line in text.split("\n") if line.strip()]


def _label(row: dict, where: str) -> int:
    """0, 1, or one of the label words."""
    label = row.get("label")
    if label in LABELS:
        return LABELS.index(label)
    if type(label) is not int or label not in (0, 1):
        raise UserError(f"{where}: label is {label!r}, neither 0 nor 1; fix the row")
    return label
