"""What a fine-tuning is told, and what it is about: the base, the data, what is made of them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from minillm.adapt.methods import MethodOptions
from minillm.cli import pick
from minillm.data.batches import Batches, Encoded
from minillm.data.samples import Sample
from minillm.data.templates import Template
from minillm.family import Family
from minillm.precision import Precision
from minillm.progress import TrainSettings

if TYPE_CHECKING:
    from minillm.footprint import Footprint


@dataclass(frozen=True)
class BaseOptions:
    """Which model, and how it is stored and computes: flags by their names."""

    checkpoint: str | None
    init: str | None
    layers: int | None
    tokenizer: str | None
    device: str
    precision: str
    frozen_dtype: str
    method: str
    attention: str
    gradient_checkpointing: bool
    seed: int


@dataclass(frozen=True)
class DataOptions:
    """Which data, and how it is cut into batches: flags by their names."""

    task: str
    data: str | None = None
    template: str | None = None
    samples: int = 200
    held_out: int = 100
    max_length: int = 512
    skip_bad: bool = False
    batch_size: int = 1
    pack: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class RunOptions:
    """Where a run is kept, and whether it begins or goes on: flags by their names."""

    out_dir: str | None
    resume: bool
    overwrite: bool
    override: bool
    wandb_project: str | None
    no_save: bool
    dry_run: bool


class Options(NamedTuple):
    """All that a fine-tuning is told."""

    base: BaseOptions
    method: MethodOptions
    data: DataOptions
    run: RunOptions
    training: TrainSettings

    @classmethod
    def from_flags(cls, flags: dict) -> "Options":
        """Those of the flags, by name, with underscores."""
        return cls(
            pick(BaseOptions, flags), MethodOptions.from_flags(flags), pick(DataOptions, flags),
            pick(RunOptions, flags), TrainSettings.from_flags(flags),
        )  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A loaded model (which most methods change in place), its tokenizer, a name for it, and how it
    computes; `held_before` are the MiB that the process held before, `size` the model's parameters
    before a method added any."""

    family: Family
    model: nn.Module
    tokenizer: object
    name: str
    precision: Precision
    held_before: float
    size: int


@dataclass(frozen=True)
class Data:
    """Encoded training and held-out samples, the latter also as text, and what they are of."""

    train: Encoded
    held_out: Encoded
    samples: list[Sample]  # the held-out ones
    labels: tuple[str, ...]
    template: Template

    @property
    def shown(self) -> Sample:
        """One held-out sample to look at."""
        return min(self.samples, key=lambda sample: len(sample.prompt))

    def hash(self) -> str:
        """Of every token and label on both sides."""
        digest = hashlib.sha256()
        for row in (*self.train.rows, *self.held_out.rows):
            digest.update(torch.stack((row.tokens, row.labels)).numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Job:
    """A method on a base with data: the adapted model, the method and a line about its size, the
    batches, and how they are trained on."""

    base: Base
    model: nn.Module
    method: str
    about: str
    data: Data
    batches: Batches
    training: TrainSettings

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.training.n_steps(
            self.batches.groups_per_epoch(self.training.accumulation_steps)
        )

    @cached_property
    def predicted(self) -> "Footprint":
        """Where the memory of a step will go, with the largest micro-batch of an epoch."""
        from minillm.footprint import predict_footprint  # takes 0.7 s: not for --help

        n = self.training.accumulation_steps
        return predict_footprint(self.model, self.batches.largest(n), self.base.precision, n)
