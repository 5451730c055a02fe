"""From (prompt, response) pairs to batches: labels by length, right padding, seeded order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minillm.data.samples import Sample, is_bare, shorten
from minillm.errors import UserError
from minillm.linear import round_up
from minillm.losses import IGNORED


class Row(NamedTuple):
    """One sample: tokens and labels, both (T,) int64; a label is its token, or -100 without
    supervision."""

    tokens: Tensor
    labels: Tensor

    @property
    def n_labels(self) -> int:
        """Tokens that are predicted; the first one never is."""
        return int((self.labels[1:] != IGNORED).sum())


class Batch(NamedTuple):
    """Rows padded on the right to one block: tokens and labels (B, T), real lengths (B,)."""

    tokens: Tensor
    labels: Tensor
    lengths: Tensor


class PackedBatch(NamedTuple):
    """Rows side by side in one: tokens and labels (1, T), real lengths (K,), and the lengths of the
    segments that the model is fed: all but the last column, paddings included."""

    tokens: Tensor
    labels: Tensor
    lengths: Tensor
    segments: list[int]


@dataclass(frozen=True)
class Encoded:
    """Encoded rows and what became of the samples they were made from (counts of samples)."""

    rows: list[Row]
    truncated: int
    dropped: int
    shortened: int = 0
    unit: str = "samples"  # what a row is

    def summary(self) -> str:
        """One line: how many samples, tokens and supervised tokens, and what was cut or dropped."""
        tokens = sum(len(row.tokens) for row in self.rows)
        supervised = sum(row.n_labels for row in self.rows)
        shortened = f"{self.shortened} prompts shortened, " if self.shortened else ""
        return (
            f"{len(self.rows)} {self.unit}, {tokens} tokens, {supervised} supervised "
            f"({supervised / max(1, tokens):.0%}); {shortened}{self.truncated} truncated, "
            f"{self.dropped} dropped (no room in --max-length)"
        )


def encode_samples(samples: Sequence[Sample], tokenizer, max_length: int) -> Encoded:
    """BOS + prompt + response + EOS, labels on response and EOS only, at most `max_length` tokens.

    Prompt and response are encoded apart, so that no token straddles the border and the prompt of
    training is, id for id, the prompt of generation. A prompt with a body (an article) gives way
    to its response: the body is shortened. Any other response that is too long is cut at the end
    and then has no EOS, because it did not end there; a sample whose prompt leaves no room for a
    response token, or whose response none for a word of the body, is dropped. All are counted.
    """
    rows, truncated, dropped, shortened = [], 0, 0, 0
    is_few = len(samples) < 1000
    for sample in tqdm(
        samples, desc="encode", unit="sample", leave=False, delay=1, disable=is_few
    ):
        # where the tokenizer puts a space before every text, it is the response's own
        text = sample.response.removeprefix(" " if tokenizer.adds_space else "")
        response = tokenizer.encode(text, eos=True)
        fitting = shorten(sample, tokenizer, max_length - len(response))
        prompt = tokenizer.encode(fitting.prompt, bos=True)
        room = max_length - len(prompt)
        if is_bare(sample, fitting) or sample.body is not None and room < len(response):
            room = 0  # a summary is never cut, nor is one of nothing taught
        if room < 1:
            dropped += 1
            continue
        shortened += fitting is not sample
        truncated += len(response) > room
        tokens = torch.tensor(prompt + response[:room])
        labels = tokens.clone()
        labels[: len(prompt)] = IGNORED
        rows.append(Row(tokens, labels))
    return Encoded(rows, truncated, dropped, shortened)


def collate(rows: Sequence[Row], pad_id: int, context: int | None = None) -> Batch:
    """Pads rows on the right to one block; paddings carry no label and no token sees them.

    The model is fed all but the last column, and that number is rounded up (`round_up`), but never
    beyond `context`, the model's max_seq_len, for the sake of rounding.
    """
    lengths = torch.tensor([len(row.tokens) for row in rows])
    fed = int(lengths.max()) - 1
    columns = max(fed, min(round_up(fed), context or 2**31)) + 1

    def block(vectors: list[Tensor], filler: int) -> Tensor:
        return torch.stack([F.pad(v, (0, columns - len(v)), value=filler) for v in vectors])

    tokens = block([row.tokens for row in rows], pad_id)  # (B, T)
    return Batch(tokens, block([row.labels for row in rows], IGNORED), lengths)


def pack(rows: Sequence[Row], pad_id: int) -> PackedBatch:
    """Rows side by side in one, each a segment; what fills it up (`round_up`) is the last.

    Nothing is predicted across a border: the first token of each row loses its label.
    """
    lengths = [len(row.tokens) for row in rows]
    fed = sum(lengths) - 1
    filler = round_up(max(1, fed)) - fed  # one token alone feeds nothing
    tokens = F.pad(torch.cat([row.tokens for row in rows]), (0, filler), value=pad_id)  # (T,)
    labels = F.pad(torch.cat([row.labels for row in rows]), (0, filler), value=IGNORED)  # (T,)
    labels[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = IGNORED
    segments = [*lengths, filler] if filler else list(lengths)
    segments[-1] -= 1  # the last column is never fed
    segments = [n for n in segments if n]
    return PackedBatch(tokens[None], labels[None], torch.tensor(lengths), segments)


def to_device(batch: tuple, device: torch.device) -> tuple:
    """The same kind of (named) tuple with its tensors on `device`."""
    moved = [x.to(device, non_blocking=True) if torch.is_tensor(x) else x for x in batch]
    return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)


class Batches:
    """Micro-batches of rows in an order that follows from (seed, epoch) alone.

    `group(i, n)` is the data of optimizer step i: n micro-batches, fewer at the end of an epoch.
    The step's index is thus the whole data cursor: nothing else need be saved to resume.
    seed None keeps the rows in their order, for evaluation. `packed` re-cuts the rows of a step
    into forwards of up to so many tokens (a longer row has one to itself): the same rows, the same
    gradient, fewer and fuller products. Source: Krell et al. 2021.
    """

    rows_of_a_sample = 1  # two where samples are pairs
    loss_per = "supervised token"  # what a loss is the mean over

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        pad_id: int,
        seed: int | None = 0,
        context: int | None = None,
        packed: int | None = None,
    ):
        if not rows:
            raise UserError("no samples left to batch; give more data or a larger --max-length")
        self.rows = rows
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.seed = seed
        self.context = context
        self.packed = packed
        self._epoch, self._order = -1, []  # the one drawn last: each of its steps needs it

    def __len__(self) -> int:
        """Micro-batches in one epoch."""
        return math.ceil(len(self.rows) / self.batch_size)

    def order(self, epoch: int) -> list[int]:
        """Row numbers in the order of this epoch."""
        return self.shuffled(len(self.rows), epoch)

    def shuffled(self, n: int, epoch: int) -> list[int]:
        """The numbers below n in this epoch's order."""
        if self.seed is None:
            return list(range(n))
        stream = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(n, generator=stream).tolist()

    def groups_per_epoch(self, size: int) -> int:
        """Optimizer steps in one epoch, the last of them perhaps from fewer micro-batches."""
        return math.ceil(len(self) / size)

    def numbers(self, index: int, size: int) -> list[int]:
        """The numbers, from 0, of the rows of optimizer step `index`."""
        epoch, place = divmod(index, self.groups_per_epoch(size))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.order(epoch)
        n = size * self.batch_size
        return self._order[place * n : (place + 1) * n]

    def group(self, index: int, size: int) -> list[Batch | PackedBatch]:
        """The micro-batches of optimizer step `index`, counted through all epochs."""
        return [self._block(rows) for rows in self._cut(index, size)]

    def largest(self, size: int = 1) -> Batch | PackedBatch:
        """The micro-batch of the first epoch's steps that holds the most, paddings included; among
        equals the one with the most labels. Unless packed, none of another epoch holds more."""

        def held(rows: list[Row]) -> tuple[int, int]:
            lengths = [len(row.tokens) for row in rows]
            size = sum(lengths) if self.packed else len(rows) * max(lengths)
            return size, sum(row.n_labels for row in rows)

        steps = range(self.groups_per_epoch(size))
        block = self._block(max((rows for i in steps for rows in self._cut(i, size)), key=held))
        if self.packed:
            return block
        # the short last one, as full as it may be in another epoch
        full = self._block([self.rows[i] for i in self.order(0)[-self.batch_size :]])
        return full if full.tokens.numel() > block.tokens.numel() else block

    def _cut(self, index: int, size: int) -> list[list[Row]]:
        """The rows of optimizer step `index`, forward by forward."""
        rows = [self.rows[i] for i in self.numbers(index, size)]
        if not self.packed:
            cuts = range(0, len(rows), self.batch_size)
            return [rows[cut : cut + self.batch_size] for cut in cuts]
        forwards, room = [], 0
        for row in rows:
            if len(row.tokens) > room:
                forwards.append([])
                room = self.packed
            forwards[-1].append(row)
            room -= len(row.tokens)
        return forwards

    def _block(self, rows: list[Row]) -> Batch | PackedBatch:
        if self.packed:
            return pack(rows, self.pad_id)
        return collate(rows, self.pad_id, self.context)

    def __iter__(self):
        """All micro-batches of epoch 0, as if it were one step."""
        return iter(self.group(0, len(self)))
