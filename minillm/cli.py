"""Every script's command line: flags in both spellings, --config FILE.json, one-line errors."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from minillm.errors import UserError
from minillm.files import read_json


class Parser(argparse.ArgumentParser):
    """argparse with the project's manners.

    --out_dir means --out-dir; --config FILE.json holds the same names and the command line wins;
    a wrong flag or value is a UserError of one line, with the nearest known flag.
    """

    def __init__(self, description: str, epilog: str | None = None):
        super().__init__(
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--config", metavar="FILE", help="JSON file with any of these settings")
        self.add_argument("--debug", action="store_true", help="show tracebacks of errors")

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses argv (default: the command line). Errors: UserError for unknown flags, values."""
        argv = [_dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
        first, _ = self._split_config(argv)
        if first is not None:
            self.set_defaults(**self._read_config(Path(first)))
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return args

    def error(self, message: str):
        """argparse's complaint as a UserError."""
        message = message.removeprefix("argument ")
        raise UserError(f"{message}; see --help")

    def _split_config(self, argv: list[str]) -> tuple[str | None, list[str]]:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        finder.error = self.error
        found, rest = finder.parse_known_args(argv)
        return found.config, rest

    def _read_config(self, path: Path) -> dict:
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: no JSON object of settings; write {{\"lr\": 1e-4, ...}}")
        known = {a.dest: a for a in self._actions}
        values = {}
        for name, value in content.items():
            action = known.get(name.replace("-", "_"))
            if action is None:
                raise UserError(f"{path}: {self._unknown('--' + name)}; remove it")
            if action.type is not None and value is not None:
                try:
                    value = action.type(value)
                except (TypeError, ValueError, argparse.ArgumentTypeError):
                    raise UserError(f"{path}: {name}: invalid value {value!r}; fix it") from None
            is_switch = action.nargs == 0
            if is_switch != isinstance(value, bool) or (
                action.type is None and not isinstance(value, bool | str | None)
            ):
                kind = "true or false" if is_switch else "text"
                raise UserError(f"{path}: {name}: {value!r} should be {kind}; fix it")
            if action.choices is not None and value is not None and value not in action.choices:
                raise UserError(f"{path}: {name}: {value!r} is none of {action.choices}; fix it")
            values[action.dest] = value
        return values

    def _unknown(self, flag: str) -> str:
        flags = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(flag.split("=")[0], flags, 1)
        return f"{flag}: unknown" + (f", did you mean {near[0]}?" if near else "")


def _dashes(word: str) -> str:
    """--out_dir=a_b -> --out-dir=a_b; anything that is no flag stays as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def add_model_flags(parser: Parser) -> argparse._ArgumentGroup:
    """The flags of every script that loads a model; returns their group, for its own."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--checkpoint", help="folder or file of weights (default: the bundled tiny model)")
    add("--layers", type=positive, help="keep only the first N layers (the others are not read)")
    add("--tokenizer", help="tokenizer file, where the checkpoint has none beside it")
    add("--attention", choices=["sdpa", "explicit"], default="sdpa",
        help="fused kernel, or scores, mask, softmax one by one: for the debugger")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return group


def positive(text: str | int) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def settings_of(args: argparse.Namespace) -> dict:
    """The resolved settings under their flags' names, for config.json."""
    return {name.replace("_", "-"): value for name, value in vars(args).items()}
