"""Samples, their splits, and the reading of JSON rows that they are made from."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import UserError
from minillm.files import read_text

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Sample:
    """What the model is given and what it should answer; `label` where the answer is one of a few,
    as its index among the task's labels; `row` the text of its row, whatever the template."""

    prompt: str
    response: str
    label: int | None = None
    row: str | None = None


@dataclass(frozen=True)
class Splits:
    """Samples to train on, to choose by (held out), and to report on, once; no test split where
    the task has none."""

    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]


def text_field(row: object, field: str, where: str, default: str | None = None) -> str:
    """A string field of a row. Errors: UserError beginning with `where`."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: no JSON object; write one on each row")
    if field not in row and default is None:
        raise UserError(f"{where}: no field {field!r}; add it or remove the row")
    value = row.get(field, default)
    if not isinstance(value, str):
        raise UserError(f"{where}: {field!r} is no string; fix the row")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{where}: {field!r} holds half a character (a surrogate); fix the row")
    return value


def read_rows(path: Path) -> list[tuple[object, str]]:
    """The rows of a JSON list or a JSONL file, each with the place to name in an error.

    Errors: UserError for broken JSON (with its line) and for a file without rows.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg}); fix it") from None
        except (RecursionError, ValueError):
            raise UserError(f"{path}: JSON nested too deep or a number too long; fix it") from None
        rows = [(row, f"{path}: row {number}") for number, row in enumerate(content, 1)]
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append((json.loads(line), f"{path}:{number}"))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: broken JSON ({error.msg}); fix it") from None
            except (RecursionError, ValueError):
                raise UserError(f"{path}:{number}: nested too deep or a number too long; fix it") \
                    from None
    if not rows:
        raise UserError(f"{path}: no samples in this file; give one with at least two")
    return rows


def split_by_hash(
    samples: Sequence[Sample], where: str | Path = "data", share: float = 0.1, salt: str = ""
) -> tuple[list, list]:
    """(train, held out): a sample is held out if the hash of its row says so, so that shuffling
    the file or another template moves nothing across, and equal rows land on the same side.
    `salt` draws another split.

    Errors: UserError if a side would be empty.
    """
    train, held_out = [], []
    for sample in samples:
        text = f"{sample.row or sample.prompt}\0{sample.response}{salt}"
        digest = hashlib.sha256(text.encode(errors="replace"))
        chosen = int.from_bytes(digest.digest()[:8], "big") < share * 2**64
        (held_out if chosen else train).append(sample)
    if not held_out and len(train) > 1:  # a handful of samples: one must do
        held_out.append(train.pop())
    if not train or not held_out:
        raise UserError(
            f"{where}: {len(samples)} sample is too few to train on and hold one out; give more"
        )
    return train, held_out
