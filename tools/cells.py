"""Experiments of many cells: each done once, in a process of its own, its numbers kept as JSON."""

import argparse
import contextlib
import csv
import gc
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from minillm.adapt.methods import MethodOptions, adapt
from minillm.adapt.prompts import check_virtual
from minillm.cli import Parser, share
from minillm.data.tasks import TASKS
from minillm.data.templates import find_template
from minillm.errors import NumericError, UserError
from minillm.family import Family
from minillm.files import read_json, write_json
from minillm.finetune import frozen_dtype, load_base
from minillm.flags import add_flags, parse
from minillm.precision import choose_device, choose_precision


class OutOfMemory(UserError):
    """A run that needed more memory than there is."""


def open_experiment(folder: str | Path, settings: dict) -> Path:
    """The experiment's folder, new or begun with the same settings. Errors: UserError if it holds
    one with others."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "experiment.json"
    known = read_json(kept) if kept.exists() else settings
    # a flag that did not exist when it began, and is not given now, is no other setting
    not_given = (None, False)
    is_other = not isinstance(known, dict) or any(
        known[name] != value if name in known else value not in not_given
        for name, value in settings.items()
    )
    if is_other:
        raise UserError(f"{folder}: an experiment with other settings; name another --out-dir")
    write_json(kept, settings)
    return folder


def done_once(path: Path, work: Callable[[], dict]) -> dict:
    """What `work` returns: computed and written to `path`, or read from there."""
    if not path.exists():
        write_json(path, work(), indent=None)
    return read_json(path)


def give_back_memory() -> None:
    """What this process measured with on a GPU, PyTorch would keep from the next cell's run."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def split_flags(text: str, where: str) -> list[str]:
    """A text of flags as a shell would take it apart. Errors: UserError for an open quote."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{where} {text!r}: {error}; fix the quotes") from None


def refuse_own(family: Family, flags: list[str], names: Iterable[str], where: str) -> None:
    """Errors: UserError if flags for the training alone (or a --config among them) give what must
    be the same when it is measured."""
    given, default = (parse_training(family, words) for words in (flags, []))
    for name in names:
        if getattr(given, name) != getattr(default, name):
            raise UserError(f"{where} --{name}: would hold for the training alone, not for what it "
                            "is compared with; give it as a flag of this tool")  # fmt: skip


def check_runs(family: Family, runs: Iterable[list[str]]) -> None:
    """check_run of each, before the first of them takes its hours."""
    for flags in runs:
        check_run(family, flags)


def check_run(family: Family, flags: list[str]) -> None:
    """Errors: UserError for flags that a fine-tuning of this kind of model does not take, wrong
    values, and what the method needs and the model lacks. No weight is loaded, no data read."""
    args = parse_training(family, flags)
    for name in ("out_dir", "no_save", "dry_run", "resume", "overwrite"):
        flag = name.replace("_", "-")
        if vars(args)[name] or f"--{flag}" in flags:
            raise UserError(f"--{flag}: a run of an experiment has its own folder, keeps what it "
                            "trained and goes on by itself; leave it out")  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()):  # its warnings are for the run itself
        precision = choose_precision(args.precision, choose_device(args.device))
        frozen_dtype(args.frozen_dtype, args.method, precision.dtype)
        find_template(args.template or TASKS[args.task].template, TASKS[args.task].field)
        where = (args.checkpoint, args.init, args.layers, args.tokenizer)
        model, tokenizer, _ = load_base(family, *where, torch.float32, torch.device("meta"))
        if args.method == "prefix_tuning":  # which would run the model for its start
            check_virtual(model, args.virtual_tokens)
        else:
            adapt(model, tokenizer, args.method, MethodOptions.from_flags(vars(args)))


def parse_training(family: Family, flags: list[str]) -> argparse.Namespace:
    """Flags as the fine-tuning of this kind of model reads them, but for --resume, which would ask
    for its folder. Errors: UserError."""
    parser = Parser("")
    add_flags(parser, ",".join(family.targets), 0.0)
    if family.name == "gpt2":
        parser.add_argument("--dropout", type=share)
    with contextlib.redirect_stderr(io.StringIO()):
        return parse(parser, [word for word in flags if word != "--resume"], 0.0)


def run_script(script: Path, folder: Path, flags: list[str]) -> None:
    """Runs a training script with `folder` as its run, continuing what is there, unless it ended;
    what it prints goes to FOLDER.log. Errors: UserError with the script's own line, OutOfMemory for
    lack of that, NumericError if its numbers broke down."""
    if (folder / "summary.json").exists():
        return
    if (folder / "metrics.jsonl").exists() and (folder / "config.json").exists():
        flags = [*flags, "--resume"]
    command = [sys.executable, str(script), "--out-dir", str(folder), *flags]
    with folder.with_name(f"{folder.name}.log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.PIPE, text=True)
        try:
            _, said = child.communicate()
        except BaseException as stopped:  # let it save: Ctrl-C went to it as well, SIGTERM did not
            if not isinstance(stopped, KeyboardInterrupt):
                child.terminate()
            child.communicate()  # and reads what it says, or it could not go on
            raise
    if child.returncode in (-9, 137):
        raise OutOfMemory(f"{folder}: the system ended the run, as it does for lack of memory")
    if child.returncode != 0:
        lines = [line for line in said.splitlines() if line.startswith("error")]
        reason = lines[-1].removeprefix("error: ") if lines else said[-300:]
        kind = NumericError if child.returncode == 3 else UserError
        kind = OutOfMemory if "out of memory" in reason else kind
        raise kind(f"{folder}: the run failed: {reason}")


def write_report(
    folder: Path, title: str, note: str, rows: list[dict], settings: dict, pictures: list[str]
) -> str:
    """report.md and table.csv: a line per row, a column per key, in the fullest row's order; what
    a row lacks stays empty. Returns what to print: the report without settings, and where it is."""
    fullest_first = sorted(rows, key=len, reverse=True)
    header = list(dict.fromkeys(key for row in fullest_first for key in row))
    lines = [[_cell(row.get(key)) for key in header] for row in rows]
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    table = "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])
    shown = "\n".join(f"![{name}]({name})" for name in pictures)
    kept = json.dumps(settings, indent=1)
    text = f"# {title}\n\n{note}\n\n{table}\n"
    (folder / "report.md").write_text(f"{text}\n{shown}\n\n```json\n{kept}\n```\n")
    more = ", ".join([*pictures, "the settings"])
    return f"{text}\nwrote {folder / 'report.md'}, with {more}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)
