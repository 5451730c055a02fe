"""What scripts need to know of a kind of model: one record, which each model's package fills in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minillm.hub import Official


@dataclass(frozen=True)
class Family:
    """The public names of a model's package, under words that are the same for all.

    `name` is the model_type of Hugging Face's config.json, `bundled` the checkpoint that comes
    along, `targets` are the layers that get LoRA unless told otherwise, `official` the published
    checkpoints by name, `read_config(path)` the config that Hugging Face's config.json describes.
    """

    name: str
    bundled: str
    config: Any
    model: Any
    tokenizer: Any
    load: Callable
    save: Callable
    targets: tuple[str, ...]
    official: dict[str, Official]
    read_config: Callable
