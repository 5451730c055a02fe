"""Alpaca's instructions (Taori et al. 2023), and tinyworld's in the same form."""

from pathlib import Path

from minillm.data.samples import (
    Sample,
    Splits,
    make_samples,
    read_rows,
    rows_to_split,
    split_by_hash,
    text_field,
)
from minillm.data.templates import Template
from minillm.data.tinyworld import instructions


def read_alpaca(
    path: str | Path, template: Template, bad: list[str] | None = None
) -> list[Sample]:
    """Alpaca's JSON list, or JSONL with one object a line: instruction, input (may be missing or
    empty), output. Errors: UserError naming file, line (or row) and field."""
    return make_samples(
        read_rows(Path(path)), lambda row, where: _sample(row, template, where), bad
    )


def _sample(row: object, template: Template, where: str) -> Sample:
    instruction, output = text_field(row, "instruction", where), text_field(row, "output", where)
    given = text_field(row, "input", where, default="")
    prompt = template.fill(instruction=instruction, input=given)
    return Sample(prompt, output, row=f"{instruction}\0{given}")


def alpaca_splits(path: str | Path, template: Template, bad: list[str] | None = None) -> Splits:
    """A tenth of the rows is held out, by a hash of the row; there is no test split."""
    return Splits(*split_by_hash(read_alpaca(path, template, bad), path), [])


def tinyworld_instructions(n_train: int, n_held_out: int, template: Template) -> Splits:
    """At least so many instructions about tinyworld on each side, split in the same way."""
    rows = instructions(rows_to_split(n_train, n_held_out))
    samples = [_sample(row, template, "tinyworld") for row in rows]
    return Splits(*split_by_hash(samples, "tinyworld"), [])
