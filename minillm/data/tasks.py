"""One reader per task: from the official files to (prompt, response) samples, and the split."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.data.templates import Template
from minillm.errors import UserError
from minillm.files import read_text


@dataclass(frozen=True)
class Sample:
    """What the model is given and what it should answer."""

    prompt: str
    response: str


def read_alpaca(path: str | Path, template: Template) -> list[Sample]:
    """Alpaca's JSON list, or JSONL with one object a line: instruction, input (may be missing or
    empty), output. Errors: UserError naming file, line (or row) and field."""
    return [alpaca_sample(row, template, where) for row, where in read_rows(Path(path))]


def alpaca_sample(row: object, template: Template, where: str) -> Sample:
    """One row as a Sample. Errors: UserError beginning with `where`."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: no JSON object; each row needs instruction and output")
    for field in ("instruction", "output"):
        if field not in row:
            raise UserError(f"{where}: no field {field!r}; add it or remove the row")
    for field in ("instruction", "input", "output"):
        if not isinstance(row.get(field, ""), str):
            raise UserError(f"{where}: {field!r} is no string; fix the row")
        if any("\ud800" <= letter <= "\udfff" for letter in row.get(field, "")):
            raise UserError(f"{where}: {field!r} holds half a character (a surrogate); fix the row")
    return Sample(template.fill(row["instruction"], row.get("input", "")), row["output"])


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
    samples: Sequence[Sample], where: str = "data", share: float = 0.1
) -> tuple[list, list]:
    """(train, held out): a sample is held out if the hash of its text says so, so that shuffling
    the file moves nothing across, and equal rows land on the same side.

    Errors: UserError if a side would be empty.
    """
    train, held_out = [], []
    for sample in samples:
        digest = hashlib.sha256(f"{sample.prompt}\0{sample.response}".encode(errors="replace"))
        chosen = int.from_bytes(digest.digest()[:8], "big") < share * 2**64
        (held_out if chosen else train).append(sample)
    if not held_out and len(train) > 1:  # a handful of samples: one must do
        held_out.append(train.pop())
    if not train or not held_out:
        raise UserError(
            f"{where}: {len(samples)} sample is too few to train on and hold one out; give more"
        )
    return train, held_out
