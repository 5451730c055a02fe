"""The tasks by name: how each is read, what stands in for its files, and how it is asked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minillm.data.alpaca import alpaca_splits, tinyworld_instructions
from minillm.data.rotten_tomatoes import LABELS, read_rotten_tomatoes, tinyworld_reviews
from minillm.data.samples import Splits
from minillm.data.templates import Template


@dataclass(frozen=True)
class Task:
    """`read` takes the official files, `tinyworld` makes bundled data (at least so many samples
    to train on and held out); `field` is what a template must have a place for."""

    template: str
    field: str
    read: Callable[[str | Path, Template], Splits]
    tinyworld: Callable[[int, int, Template], Splits]
    labels: tuple[str, ...] = ()


TASKS = {
    "alpaca": Task("alpaca", "instruction", alpaca_splits, tinyworld_instructions),
    "rotten_tomatoes": Task("reviews", "text", read_rotten_tomatoes, tinyworld_reviews, LABELS),
}
