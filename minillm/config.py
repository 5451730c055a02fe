"""What the configurations of all models share: checks of their sizes, and presets by name."""

from dataclasses import fields, replace
from pathlib import Path

from minillm.errors import UserError


def check_sizes(config) -> None:
    """Every int of a config dataclass must be positive, every float positive and finite.

    Errors: UserError naming the field and its value.
    """
    kind = type(config).__name__
    for field in fields(config):
        name, value = f"{kind}.{field.name}", getattr(config, field.name)
        if field.type is int and (type(value) is not int or not 0 < value < 2**31):
            raise UserError(f"{name} is {value}; it must be a positive integer")
        is_number = isinstance(value, int | float) and 0 < value < float("inf")
        if field.type is float and not is_number:
            raise UserError(f"{name} is {value}; it must be a positive number")
    sizes = sorted(v for f in fields(config) if type(v := getattr(config, f.name)) is int)
    if sizes[-1] * sizes[-2] > 2**40:  # no tensor of it could be made
        raise UserError(f"{kind}: {sizes[-2]} by {sizes[-1]} is beyond any machine; fix the sizes")
    if config.n_layers > 1000:  # building the modules alone would take minutes
        raise UserError(f"{kind}.n_layers is {config.n_layers}; more than 1000 are refused")


def find_preset(name: str, presets: dict):
    """A published configuration by name. Errors: UserError listing the known names."""
    if name not in presets:
        raise UserError(f"preset {name!r} is unknown; known: {', '.join(presets)}")
    return presets[name]


def with_layers(config, n_layers: int | None, where: str | Path):
    """The configuration with its first layers alone (None: all of them). Errors: UserError if it
    has not so many."""
    have, wanted = config.n_layers, config.n_layers if n_layers is None else n_layers
    if not (isinstance(wanted, int) and 1 <= wanted <= have):
        raise UserError(f"{where}: has {have} layers, not {wanted}; lower --layers")
    return replace(config, n_layers=wanted)
