"""From (prompt, response) pairs to batches: labels by length, right padding, seeded order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.data.samples import Sample, shorten
from minillm.errors import UserError
from minillm.losses import IGNORED


class Row(NamedTuple):
    """One sample: tokens and labels, both (T,) int64; a label is its token, or -100 without
    supervision."""

    tokens: Tensor
    labels: Tensor


class Batch(NamedTuple):
    """Rows padded on the right to one block: tokens and labels (B, T), real lengths (B,)."""

    tokens: Tensor
    labels: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Encoded:
    """Encoded rows and what became of the samples they were made from (counts of samples)."""

    rows: list[Row]
    truncated: int
    dropped: int
    shortened: int = 0

    def summary(self) -> str:
        """One line: how many samples, tokens and supervised tokens, and what was cut or dropped."""
        tokens = sum(len(row.tokens) for row in self.rows)
        supervised = sum(int((row.labels != IGNORED).sum()) for row in self.rows)
        shortened = f"{self.shortened} prompts shortened, " if self.shortened else ""
        return (
            f"{len(self.rows)} samples, {tokens} tokens, {supervised} supervised "
            f"({supervised / max(1, tokens):.0%}); {shortened}{self.truncated} truncated, "
            f"{self.dropped} dropped (no room in --max-length)"
        )


def encode_samples(samples: Sequence[Sample], tokenizer, max_length: int) -> Encoded:
    """BOS + prompt + response + EOS, labels on response and EOS only, at most `max_length` tokens.

    Prompt and response are encoded apart, so that no token straddles the border and the prompt of
    training is, id for id, the prompt of generation. A prompt with a body (an article) gives way
    to its response: the body is shortened. Any other response that is too long is cut at the end
    and then has no EOS, because it did not end there; a sample whose prompt leaves no room for a
    response token is dropped. All three are counted.
    """
    rows, truncated, dropped, shortened = [], 0, 0, 0
    for sample in samples:
        response = encode_response(sample.response, tokenizer)
        fitting = shorten(sample, tokenizer, max_length - len(response))
        shortened += fitting is not sample
        prompt = tokenizer.encode(fitting.prompt, bos=True)
        room = max_length - len(prompt)
        if sample.body is not None and room < len(response):
            room = 0  # not even without its body: a summary is never cut
        if room < 1:
            dropped += 1
            continue
        truncated += len(response) > room
        tokens = torch.tensor(prompt + response[:room])
        labels = tokens.clone()
        labels[: len(prompt)] = IGNORED
        rows.append(Row(tokens, labels))
    return Encoded(rows, truncated, dropped, shortened)


def encode_response(text: str, tokenizer) -> list[int]:
    """Ids of what follows a prompt, with EOS: its leading space, if any, is the one that
    SentencePiece puts before every text."""
    if tokenizer.adds_space:
        text = text.removeprefix(" ")
    return tokenizer.encode(text, eos=True)


def collate(rows: Sequence[Row], pad_id: int, context: int | None = None) -> Batch:
    """Pads rows on the right to one block; paddings carry no label and no token sees them.

    The model is fed all but the last column, and that number is rounded up to a multiple of 16:
    in bf16 a CPU compiles its kernels anew for each length it meets, a GPU's tensor cores want
    multiples of 8. (Measured on tiny-llama: 4 to 18 times the tokens per second.) It never goes
    beyond `context`, the model's max_seq_len, for the sake of rounding.
    """
    lengths = torch.tensor([len(row.tokens) for row in rows])
    fed = int(lengths.max()) - 1
    columns = max(fed, min(fed + -fed % 16, context or 2**31)) + 1

    def block(vectors: list[Tensor], filler: int) -> Tensor:
        return torch.stack([F.pad(v, (0, columns - len(v)), value=filler) for v in vectors])

    tokens = block([row.tokens for row in rows], pad_id)  # (B, T)
    return Batch(tokens, block([row.labels for row in rows], IGNORED), lengths)


class Batches:
    """Micro-batches of rows in an order that follows from (seed, epoch) alone.

    `group(i, n)` is the data of optimizer step i: n micro-batches, fewer at the end of an epoch.
    The step's index is thus the whole data cursor: nothing else need be saved to resume.
    seed None keeps the rows in their order, for evaluation.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        pad_id: int,
        seed: int | None = 0,
        context: int | None = None,
    ):
        if not rows:
            raise UserError("no samples left to batch; give more data or a larger --max-length")
        self.rows = rows
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.seed = seed
        self.context = context

    def __len__(self) -> int:
        """Micro-batches in one epoch."""
        return math.ceil(len(self.rows) / self.batch_size)

    def order(self, epoch: int) -> list[int]:
        """Row numbers in the order of this epoch."""
        if self.seed is None:
            return list(range(len(self.rows)))
        stream = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=stream).tolist()

    def groups_per_epoch(self, size: int) -> int:
        """Optimizer steps in one epoch, the last of them perhaps from fewer micro-batches."""
        return math.ceil(len(self) / size)

    def group(self, index: int, size: int) -> list[Batch]:
        """The micro-batches of optimizer step `index`, counted through all epochs."""
        epoch, place = divmod(index, self.groups_per_epoch(size))
        order = self.order(epoch)
        span = order[place * size * self.batch_size : (place + 1) * size * self.batch_size]
        cuts = range(0, len(span), self.batch_size)
        micro = [[self.rows[i] for i in span[cut : cut + self.batch_size]] for cut in cuts]
        return [collate(rows, self.pad_id, self.context) for rows in micro]

    def largest(self) -> Batch:
        """The micro-batch of the first epoch that holds the most, paddings included; among equals
        the one with the most labels."""
        order = self.order(0)
        cuts = range(0, len(order), self.batch_size)

        def size(rows: list[Row]) -> tuple[int, int]:
            labels = sum(int((row.labels != IGNORED).sum()) for row in rows)
            return len(rows) * max(len(row.tokens) for row in rows), labels

        groups = ([self.rows[i] for i in order[cut : cut + self.batch_size]] for cut in cuts)
        return collate(max(groups, key=size), self.pad_id, self.context)

    def __iter__(self):
        """All micro-batches of epoch 0."""
        return (self.group(index, 1)[0] for index in range(len(self)))
