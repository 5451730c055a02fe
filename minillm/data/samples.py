"""Samples, their splits, and the reading of the rows (JSON, CSV) that they are made from."""

import bisect
import csv
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minillm.errors import UserError
from minillm.files import check_readable, read_json

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Body:
    """Where in a prompt the part lies that may be shortened, and after what it may be cut."""

    start: int
    end: int
    cut_at: str = r"\s+"  # a regular expression: by default, between words


@dataclass(frozen=True)
class Sample:
    """What the model is given and what it should answer; `label` where the answer is one of a few,
    as its index among the task's labels; `row` the text of its row, whatever the template, as one
    text or by field; `body` the part of the prompt to shorten where it is too long."""

    prompt: str
    response: str
    label: int | None = None
    row: str | dict[str, str] | None = None
    body: Body | None = None


def shorten(sample: Sample, tokenizer, room: int) -> Sample:
    """The sample with as much of its body, from the front, as lets BOS + prompt fit in `room`
    tokens: the whole of it where that fits, nothing of it where nothing fits or helps."""
    body, text = sample.body, sample.prompt

    def cut_to(end: int) -> str:
        return text[:end] + text[body.end :]

    def fits(prompt: str) -> bool:
        return len(tokenizer.encode(prompt, bos=True)) <= room

    if body is None or fits(text):
        return sample
    inside = text[body.start : body.end]
    for pattern in (body.cut_at, r"\s+"):  # a first paragraph longer than all: between words
        ends = [body.start + m.start() for m in re.finditer(pattern, inside) if m.start()]
        n_fitting = bisect.bisect_left(ends, True, key=lambda end: not fits(cut_to(end)))
        if n_fitting:
            return replace(sample, prompt=cut_to(ends[n_fitting - 1]), body=None)
    return replace(sample, prompt=cut_to(body.start), body=None)


def is_bare(sample: Sample, shortened: Sample) -> bool:
    """Whether shortening left nothing of a sample's body."""
    body, text = sample.body, sample.prompt
    if body is None or shortened is sample:
        return False
    return shortened.prompt == text[: body.start] + text[body.end :]


@dataclass(frozen=True)
class Splits:
    """Samples to train on, to choose by (held out), and to report on, once; no test split where
    the task has none."""

    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]


def text_field(row: object, field: str, where: str, default: str | None = None) -> str:
    """A string field of a row. Errors: UserError beginning with `where`."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: no JSON object; write one on each row")
    if field not in row and default is None:
        raise UserError(f"{where}: no field {field!r}; add it or remove the row")
    value = row.get(field, default)
    if not isinstance(value, str):
        raise UserError(f"{where}: {field!r} is no string; fix the row")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{where}: {field!r} holds half a character (a surrogate); fix the row")
    return value


Rows = Iterable[tuple[object, str]]  # what a row holds, and the place to name in an error


def make_samples(
    rows: Rows, make: Callable[[object, str], Sample], bad: list[str] | None, n: int | None = None
) -> list[Sample]:
    """`make(row, where)` of every row, or of as many as give n samples. `bad` collects what is
    wrong with rows, which are then left out; None: the first of them is an error. Errors:
    UserError."""
    samples = []
    for row, where in rows:
        if len(samples) == n:
            break
        try:
            if isinstance(row, UserError):
                raise row
            samples.append(make(row, where))
        except UserError as error:
            if bad is None:
                raise
            bad.append(str(error))
    return samples


def read_rows(path: Path) -> Rows:
    """The rows of a JSON list or a JSONL file, each with the place to name in an error; in place of
    a broken line the UserError that it is, for make_samples.

    Errors: UserError for a broken list (with its line) and for a file without rows.
    """
    check_readable(path)
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip().startswith(b"["):
        rows = [(row, f"{path}: row {n}") for n, row in enumerate(read_json(path), 1)]
    else:
        rows = []
        for number, line in enumerate(raw.split(b"\n"), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError:
                row = UserError(f"{where}: not UTF-8 text; convert or remove the row")
            except json.JSONDecodeError as error:
                row = UserError(f"{where}: broken JSON ({error.msg}); fix or remove it")
            except (RecursionError, ValueError):
                row = UserError(f"{where}: nested too deep or a number too long; fix it")
            rows.append((row, where))
    if not rows:
        raise UserError(f"{path}: no samples in this file; give one with at least two")
    return rows


ANSWERS = ("chosen", "rejected", "summary", "highlights")  # fields of a row that are no question


def _question(sample: Sample) -> str:
    """What a row asks; nothing where it only tells."""
    row = sample.prompt if sample.row is None else sample.row
    if isinstance(row, dict):
        row = "\0".join(text for field, text in row.items() if field not in ANSWERS)
    return row.strip("\0")


def _whole_row(sample: Sample) -> str:
    row = sample.prompt if sample.row is None else sample.row
    row = "\0".join(row.values()) if isinstance(row, dict) else row
    return f"{row}\0{sample.response}"


def _hash(text: str) -> int:
    """64 bits that look drawn, always the same for a text."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big")


def split_by_hash(
    samples: Sequence[Sample], where: str | Path = "data", share: float = 0.1, salt: str = ""
) -> tuple[list, list]:
    """(train, held out): a sample is held out if the hash of its row says so, so that shuffling
    the file or another template moves nothing across, and equal rows land on the same side. Rows
    that answer one question in several ways go together, the questions by their hashes up to the
    share; not what more than that share of all rows ask, which is no question but a phrase.
    `salt` draws another split.

    Errors: UserError if a side would be empty.
    """
    together = _held_out_questions(samples, share, salt)
    train, held_out = [], []
    for sample in samples:
        chosen = together.get(_question(sample))
        if chosen is None:
            chosen = _hash(_whole_row(sample) + salt) < share * 2**64
        (held_out if chosen else train).append(sample)
    if not held_out and len(train) > 1:  # a handful of samples: one must do
        held_out.append(train.pop())
    if not train or not held_out:
        raise UserError(
            f"{where}: too few samples ({len(samples)}) to train on some and hold out others "
            "(equal ones stay together); give more"
        )
    return train, held_out


def _held_out_questions(samples: Sequence[Sample], share: float, salt: str) -> dict[str, bool]:
    """Whether the rows of a question are held out, for those whose rows go together."""
    asked, answers = Counter(map(_question, samples)), defaultdict(set)
    for sample in samples:
        answers[_question(sample)].add(_whole_row(sample))
    most = share * len(samples)
    sizes = {q: n for q, n in asked.items() if q and len(answers[q]) > 1 and n <= most}
    chosen, room = {}, share * sum(sizes.values())
    for question in sorted(sizes, key=lambda question: _hash(question + salt)):
        chosen[question] = sizes[question] / 2 <= room
        room -= sizes[question] if chosen[question] else 0
    return chosen


def rows_to_split(n_train: int, n_held_out: int) -> int:
    """Rows enough for split_by_hash to leave so many on each side: it holds out about a tenth."""
    return n_train * 6 // 5 + n_held_out * 12


MIN_TEST = 200  # samples of a generated test split
NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


def stand_in_splits(
    rows: Callable[[int], Iterable], make: Callable[[object], Sample], n_train: int, n_held_out: int
) -> Splits:
    """`make(row)` of generated rows: the test split comes first, at least MIN_TEST of them, so that
    its samples are the same whatever the sizes asked for."""
    n_test = max(n_held_out, MIN_TEST)
    samples = [make(row) for row in rows(n_test + n_train + n_held_out)]
    test, rest = samples[:n_test], samples[n_test:]
    return Splits(rest[:n_train], rest[n_train:], test)


def read_splits(
    path: str | Path, make: Callable[[object, str], Sample], bad: list[str] | None,
    n: int | None = None, kind: str = "jsonl", arrange: Callable[[list], list] = list,
) -> Splits:  # fmt: skip
    """`make(row, where)` of the rows of a folder's train, validation (or valid, dev) and test file,
    of each the first `n` that are good, or of one file, of which a tenth each is held out by a
    hash of the row; `kind` is "jsonl" or "csv", `bad` as for make_samples, `arrange` orders a
    file's samples.

    Errors: UserError naming what is missing, and whatever `make` finds.
    """
    path = Path(path)

    def read(file: Path) -> list[Sample]:
        rows = read_csv_rows(file) if kind == "csv" else read_rows(file)
        return arrange(make_samples(rows, make, bad, n if path.is_dir() else None))

    if not path.is_dir():
        rest, test = split_by_hash(read(path), path)
        train, validation = split_by_hash(rest, path, 1 / 9, salt="validation")
        return Splits(train, validation, test)
    found = []
    for split in SPLITS:
        files = [path / f"{name}.{kind}" for name in NAMES[split]]
        found.append(next((file for file in files if file.exists()), files[0]))
    if not any(file.exists() for file in found):
        raise UserError(f"{path}: no {found[0].name} and the like in this folder; check the path")
    return Splits(*(read(file) for file in found))


def read_csv_rows(path: Path) -> Rows:
    """The rows of a CSV file with a header, read as they are asked for (CNN/DailyMail's 287,113
    take 1.2 GB), each with the place to name in an error.

    Errors: UserError for a broken file and one without rows.
    """
    csv.field_size_limit(2**31 - 1)  # an article may be longer than the library expects
    check_readable(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        empty = True
        try:
            for row in reader:
                empty = False
                where = f"{path}:{reader.line_num}"
                if any(row.pop(None, ())):  # where DictReader puts what it has no column for
                    yield UserError(f"{where}: more fields than the header has columns; put those "
                                    "that hold commas in quotes, or remove it"), where  # fmt: skip
                    continue
                lines = {k: v.replace("\r\n", "\n") if isinstance(v, str) else v
                         for k, v in row.items()}  # fmt: skip
                try:
                    "".join(map(str, row.values())).encode()
                except UnicodeEncodeError:  # of the bytes that were no text
                    lines = UserError(f"{where}: not UTF-8 text; convert or remove the row")
                yield lines, where
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: broken CSV ({error}); fix it") from None
    if empty:
        raise UserError(f"{path}: no samples in this file; give one with at least two")
