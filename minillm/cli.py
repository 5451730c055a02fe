"""Every script's command line: flags in both spellings, --config FILE.json, one-line errors."""

import argparse
import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from minillm.errors import UserError
from minillm.files import read_json

T = TypeVar("T")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, and tells every default that a help text does not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, known = action.help, action.default
        is_none = known is None or known is False or known in ("", [], argparse.SUPPRESS)
        if not text or "(default" in text or is_none:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse with the project's manners.

    --out_dir means --out-dir; --config FILE.json holds the same names and the command line wins;
    a wrong flag or value is a UserError of one line, with the nearest known flag.
    """

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        self._own_defaults: dict[str, object] = {}
        self.add_argument("--config", metavar="FILE", help="JSON file with any of these settings")
        self.add_argument("--debug", action="store_true", help="show tracebacks of errors")

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses argv (default: the command line). Errors: UserError for unknown flags, values."""
        argv = _join(_dashes(word) for word in (sys.argv[1:] if argv is None else argv))
        config = self._find_config(argv)
        if config is not None:
            self._take(self._read_config(Path(config)), argv)
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return args

    def error(self, message: str):
        """argparse's complaint as a UserError."""
        message = message.removeprefix("argument ")
        raise UserError(f"{message}; see --help")

    def _find_config(self, argv: list[str]) -> str | None:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        finder.error = self.error
        return finder.parse_known_args(argv)[0].config

    def _read_config(self, path: Path) -> dict:
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: no JSON object of settings; write {{\"lr\": 1e-4, ...}}")
        known = {option: a for a in self._actions for option in a.option_strings}
        values = {}
        for name, value in content.items():
            flag = "--" + name.replace("_", "-")
            action = known.get(flag)
            if action is None:
                raise UserError(f"{path}: {self._unknown(flag)}; remove it")
            try:
                values[action.dest] = _config_value(action, flag, value)
            except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
                raise UserError(f"{path}: {name}: {value!r}: {error}; fix it") from None
        return values

    def own_default(self, name: str) -> object:
        """The default of a flag (by its name, with underscores) without --config."""
        return self._own_defaults.get(name, self.get_default(name))

    def _take(self, values: dict, argv: list[str]) -> None:
        """Makes a file's values the defaults: the flag of one need not be given, and of a flag that
        may be repeated those on the command line replace the file's."""
        given = {word.partition("=")[0] for word in argv}
        for action in self._actions:
            if action.dest in values:
                action.required = False
            if isinstance(action, argparse._AppendAction) and given & {*action.option_strings}:
                values.pop(action.dest, None)
        self._own_defaults = {name: self.get_default(name) for name in values}
        self.set_defaults(**values)

    def _unknown(self, flag: str) -> str:
        flags = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(flag.split("=")[0], flags, 1)
        return f"{flag}: unknown" + (f", did you mean {near[0]}?" if near else "")


def _config_value(action: argparse.Action, flag: str, value: object) -> object:
    """A JSON value as the flag's own: null only where the flag may be left out, switches true or
    false, numbers and texts as they would be on the command line.

    Errors: ValueError, TypeError or ArgumentTypeError saying what is expected.
    """
    if value is None and action.default is None and not action.required:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("true or false is expected")
        is_pair = isinstance(action, argparse.BooleanOptionalAction)
        return not value if is_pair and flag.startswith("--no-") else value
    if isinstance(action, argparse._AppendAction):
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError("a list of texts is expected")
        return value
    if isinstance(value, bool | list | dict) or action.type is None and not isinstance(value, str):
        raise ValueError("another kind of value is expected")
    value = action.type(str(value)) if action.type is not None else value
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"choose from {', '.join(map(str, action.choices))}")
    return value


def _dashes(word: str) -> str:
    """--out_dir=a_b -> --out-dir=a_b; anything that is no flag stays as it is."""
    if not re.match(r"--[A-Za-z0-9_-]+(=|$)", word):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _join(argv: Iterable[str]) -> list[str]:
    """--train-flags --rslora -> --train-flags=--rslora: argparse takes a single flag given as a
    value for the next flag."""
    words: list[str] = []
    for word in argv:
        if words and re.fullmatch(r"--[\w-]+-flags", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def add_model_flags(parser: Parser) -> argparse._ArgumentGroup:
    """The flags of every script that loads a model; returns their group, for its own."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--checkpoint", "--init-from", "--model-path", metavar="NAME|PATH",
        help="folder or file of weights, or a name under checkpoints/, such as gpt2-medium once "
        "it is downloaded (default: the bundled tiny model)")  # fmt: skip
    add("--layers", type=positive, help="keep only the first N layers (the others are not read)")
    add("--tokenizer", "--tokenizer-path",
        help="tokenizer file, where the checkpoint has none beside it")  # fmt: skip
    add("--attention", choices=["sdpa", "explicit"], default="sdpa",
        help="fused kernel, or scores, mask, softmax one by one: for the debugger")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return group


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return int(_within(text, int, 1, 2**53, "a whole number of at least 1"))


def whole(text: str) -> int:
    """A whole number from 0 on, such as a seed."""
    return int(_within(text, int, 0, 2**53, "a whole number from 0 on"))


def amount(text: str) -> float:
    """A finite number of at least 0."""
    return _within(text, float, 0.0, sys.float_info.max, "a number of at least 0")


def above_zero(text: str) -> float:
    """A finite number above 0."""
    return _within(text, float, sys.float_info.min, sys.float_info.max, "a number above 0")


def share(text: str) -> float:
    """A number from 0 up to, not including, 1."""
    return _within(text, float, 0.0, 1 - 2**-53, "a number from 0 to below 1")


def several(kind: Callable[[str], object]) -> Callable[[str], list]:
    """Values of a kind with commas between."""
    return lambda text: [kind(part.strip()) for part in text.split(",")]


def seeds(text: str) -> list[int]:
    """Seeds with commas between, each once: a mean of one taken twice is of fewer than it says."""
    found = several(whole)(text)
    if len({*found}) < len(found):
        raise argparse.ArgumentTypeError(f"{text} names a seed twice; give each once")
    return found


def check_known(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Errors: UserError naming the first name that is none of the known ones, and those."""
    for name in names:
        if name not in known:
            raise UserError(f"{what} {name!r} is unknown; choose from {', '.join(known)}")


def _within(
    text: str, kind: type[int] | type[float], low: float, high: float, wanted: str
) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
    return value


def pick(kind: type[T], flags: dict) -> T:
    """A dataclass made of the flags of its fields' names, all of which there must be."""
    return kind(**{field.name: flags[field.name] for field in dataclasses.fields(kind)})


def settings_of(args: argparse.Namespace) -> dict:
    """The resolved settings under their flags' names, for config.json: what is computed, not
    where it is kept or how it is shown."""
    about_the_run = {"config", "debug", "out_dir", "resume", "overwrite", "override", "dry_run"}
    kept = {name: value for name, value in vars(args).items() if name not in about_the_run}
    return {name.replace("_", "-"): value for name, value in kept.items()}
