"""Pairs of answers to one prompt, one better than the other: what DPO trains on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from minillm.data import tinyworld
from minillm.data.batches import Batches, Encoded, Row, encode_samples
from minillm.data.samples import (
    Sample,
    Splits,
    read_splits,
    rows_to_split,
    split_by_hash,
    text_field,
)
from minillm.data.templates import Template


def read_preferences(
    path: str | Path, template: Template, bad: list[str] | None = None
) -> Splits:
    """From a folder with train, validation and test.jsonl, or one JSONL file (prompt, chosen,
    rejected), of which a tenth each is held out by a hash of the row. A sample's response is the
    chosen answer; its row has both. Errors: UserError naming file, line and field."""

    def make(row: object, where: str) -> Sample:
        return _sample({name: text_field(row, name, where) for name in FIELDS}, template)

    return read_splits(path, make, bad)


FIELDS = ("prompt", "chosen", "rejected")


def _sample(row: dict[str, str], template: Template) -> Sample:
    prompt = template.fill(instruction=row["prompt"], input="")
    return Sample(prompt, row["chosen"], row=row)


def tinyworld_preferences(n_train: int, n_held_out: int, template: Template) -> Splits:
    """At least so many pairs about tinyworld on each side."""
    rows = tinyworld.preferences(rows_to_split(n_train, n_held_out))
    samples = [_sample(row, template) for row in rows]
    return Splits(*split_by_hash(samples, "tinyworld"), [])


def encode_pairs(samples: Sequence[Sample], tokenizer, max_length: int) -> Encoded:
    """The chosen answers in the even rows, the rejected ones in the odd rows; a pair of which one
    is too long to be whole is dropped, and counted."""
    rows: list[Row] = []
    dropped = 0
    for sample in tqdm(samples, desc="encode", unit="pair", leave=False, delay=1):
        both = [sample, replace(sample, response=sample.row["rejected"])]
        encoded = encode_samples(both, tokenizer, max_length)
        if encoded.truncated or encoded.dropped:
            dropped += 1
            continue
        rows += encoded.rows
    return Encoded(rows, 0, dropped, unit="answers in pairs")


class PairBatches(Batches):
    """Batches that keep pairs of rows together; `batch_size` counts rows, two for each pair."""

    rows_of_a_sample = 2
    loss_per = "pair"

    def order(self, epoch: int) -> list[int]:
        """Row numbers, pair after pair, in the order of this epoch."""
        pairs = self.shuffled(len(self.rows) // 2, epoch)
        return [row for pair in pairs for row in (2 * pair, 2 * pair + 1)]
