"""Files of text and JSON: read with errors that name file and line, written atomically."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

from minillm.errors import UserError


def read_json(path: Path) -> dict | list:
    """A JSON file. Errors: UserError naming the file and the line of the fault."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg}); fix it") from None
    except (RecursionError, ValueError):
        raise UserError(f"{path}: this JSON is nested too deep or too large; fix it") from None


def read_text(path: Path) -> str:
    """A UTF-8 file, byte-order mark removed. Errors: UserError naming the file (and the line)."""
    check_readable(path)
    raw = Path(path).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8") from None


def check_readable(path: Path) -> None:
    """Errors: UserError if the file is missing, empty, packed, or a page or pointer in place of
    data."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder; name the file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise UserError(f"{path}: the file is empty; download it again")
    if head.startswith((b"\x1f\x8b", b"PAR1")):
        kind = "Parquet" if head.startswith(b"PAR1") else "gzip"
        raise UserError(f"{path}: a {kind} file; unpack it or convert it to text")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git-LFS pointer, not the file itself; run `git lfs pull`")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path}: an HTML page, not the file itself; download it again")


def set_aside(*paths: Path) -> None:
    """Renames files or a folder to NAME-1, or NAME-2, ...: the first number that is free for all of
    them; and says so. Those that do not exist are left out."""

    def numbered(path: Path, n: int) -> Path:
        stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
        return path.with_name(f"{stem}-{n}{suffix}")

    n = 1
    while any(os.path.lexists(numbered(path, n)) for path in paths):
        n += 1
    for path in paths:
        if os.path.lexists(path):
            kept = path.rename(numbered(path, n))
            print(f"kept what was there as {kept}")


@contextlib.contextmanager
def atomic_file(path: Path, n_bytes: int = 0):
    """Yields a temporary path beside `path`; moves it there, synced, if the body succeeds.

    A reader sees the old file or the new one, never half of it; a failure leaves the old one.
    Errors: UserError where there is no space for it: `n_bytes` is how much will be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    if n_bytes and shutil.disk_usage(path.parent).free < n_bytes:
        raise _no_space(path.parent, n_bytes)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors writes 0600
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        if _is_full(error):
            raise _no_space(path.parent, n_bytes) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _is_full(error: Exception) -> bool:
    """Whether a disk or quota is full: torch.save and safetensors do not say so by an errno."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    signs = ("No space left", "File too large", "quota", "PytorchStreamWriter", "unexpected pos")
    return any(sign in str(error) for sign in signs)


def _no_space(folder: Path, n_bytes: int) -> UserError:
    need = f"need {max(1, n_bytes >> 20)} MB, " if n_bytes else ""
    free = shutil.disk_usage(folder).free >> 20
    return UserError(f"{folder}: no space left ({need}free {free} MB); free some, then run again")


_HELD: dict[Path, list[int]] = {}  # folders this process holds: the open file, how many hold it


def lock_folder(folder: Path) -> Path:
    """Holds a folder for this process until unlock_folder, or until it ends, however it ends; as
    often as it likes. Returns what unlock_folder wants.

    Errors: UserError naming the process that holds it.
    """
    key = Path(os.path.realpath(folder))
    if key in _HELD:
        _HELD[key][1] += 1
        return key
    descriptor = os.open(key / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 20).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise UserError(f"{folder} is in use by pid {holder or 'unknown'}; wait for it, stop it, "
                        "or name another --out-dir") from None  # fmt: skip
    except OSError as error:  # a file system without locks
        print(f"warning: {folder}: cannot be locked ({error.strerror}); let no second run in",
              file=sys.stderr)  # fmt: skip
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    _HELD[key] = [descriptor, 1]
    return key


def unlock_folder(key: Path) -> None:
    """Lets go of what lock_folder returned; the last one to do so opens the folder to others."""
    _HELD[key][1] -= 1
    if _HELD[key][1] == 0:
        os.close(_HELD.pop(key)[0])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict | list, indent: int | None = 2) -> None:
    """Writes JSON atomically, indented unless told otherwise, with a closing newline."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    with atomic_file(path) as temporary:  # a path that is no UTF-8 holds surrogates
        temporary.write_text(text + "\n", "utf-8", "backslashreplace")


class Fields:
    """The fields of a JSON object, each checked as it is asked for.

    Errors: UserError naming file, field and value.
    """

    def __init__(self, path: Path):
        self.path = path
        self.content = read_json(path)
        if not isinstance(self.content, dict):
            raise UserError(f"{path}: no JSON object; give the model's own file")

    def get(self, name: str, default=None):
        """The field, or the default where it is missing or null."""
        value = self.content.get(name)
        return default if value is None else value

    def check_kind(self, model_type: str) -> None:
        """Errors: UserError if the file says it is of another kind of model."""
        found = self.get("model_type", model_type)
        if found != model_type:
            raise UserError(f"{self.path}: model_type {found!r} is not {model_type}; not supported")

    def refuse(self, refused: dict[str, bool], kind: str) -> None:
        """Errors: UserError naming the first of these fields that is not as in this kind of model,
        with its value."""
        for field, bad in refused.items():
            if bad:
                value = self.get(field)
                raise UserError(f"{self.path}: {field} {value!r} is not {kind}; not supported")

    def table(self, name: str) -> dict:
        """A JSON object, {} where it is missing."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.path}: {name} is {value!r}, no JSON object; fix it")
        return value

    def take_rope(self) -> None:
        """Puts the fields of `rope_parameters` in the place of the file's own. Errors: UserError if
        they, or `rope_scaling`, ask for other angles than plain RoPE's."""
        found, scaling = self.table("rope_parameters"), self.table("rope_scaling")
        if any(value not in (None, "default") for value in scaling.values()):
            raise UserError(f"{self.path}: rope_scaling {scaling!r} is no plain RoPE's; not "
                            "supported")  # fmt: skip
        if (found.get("rope_type") or found.get("type")) not in (None, "default"):
            raise UserError(f"{self.path}: rope_parameters {found!r} are no plain RoPE's; not "
                            "supported")  # fmt: skip
        self.content |= {name: value for name, value in found.items() if value is not None}

    def whole(self, name: str, default: int | None = None) -> int:
        """A positive whole number below 2^31."""
        value = self.get(name, default)
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise UserError(f"{self.path}: {name} is {value!r}, no positive whole number; fix it")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or not 0 < value < 1e300:  # an int may be larger
            raise UserError(f"{self.path}: {name} is {value!r}, no positive number; fix it")
        return float(value)

    def build(self, kind, *values):
        """kind(*values). Errors: its UserError, with the file named."""
        try:
            return kind(*values)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
