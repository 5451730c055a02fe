"""Checkpoints by name: where they are on this machine, and how the official ones are fetched.

Which ones there are, each model's package says (its FAMILY). Hashes are those of the files as
published; a weight file without one is held against the one that the hub tells. Nothing is fetched
unless tools/download.py is run.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minillm.errors import UserError
from minillm.files import check_readable, read_json

DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS}
BREAKS = 20  # of the connection, in one file
CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
CONFIGS = ("config.json", "params.json")  # Hugging Face's and Meta's


@dataclass(frozen=True)
class Official:
    """A model on the Hugging Face hub: its repository, files, and the known SHA-256 of some."""

    repo: str
    files: tuple[str, ...]
    sha256: dict[str, str] = field(default_factory=dict)
    gated: bool = False


def find_checkpoint(name: str | Path) -> Path:
    """A path as it is, or the folder of that name among the checkpoints.

    Errors: UserError telling how to get what is not there.
    """
    here = Path(os.path.relpath(CHECKPOINTS))  # an adapter remembers its base by this path
    folder = CHECKPOINTS if here.parts[:1] == ("..",) else here
    for path in (Path(name), folder / name):
        # a folder here may have a model's name and hold something else, as gpt2's code does
        if path.is_file() or any((path / file).exists() for file in CONFIGS):
            return path
    if Path(name).name != str(name):
        if Path(name).exists():
            return Path(name)  # its reader says what is missing
        raise UserError(f"{name}: no such file or folder; check the path")
    raise UserError(
        f"{name}: no folder here with a config.json or params.json, nor under {folder}; check the "
        f"path, or fetch an official model: python tools/download.py {name}"
    )


def fetch(
    official: Official, folder: Path, endpoint: str | None = None, token: str | None = None,
    offline: bool = False,
) -> list[Path]:  # fmt: skip
    """Fetches an official checkpoint into `folder`, all but what is there; returns its files.

    `endpoint` is another hub's address; `offline` asks nobody and only checks. Errors: UserError
    saying what to do about a gated model, a missing network, or a file whose SHA-256 is not the
    published one (it is removed).
    """
    folder = folder.resolve()

    def get(file: str) -> Path:
        if offline:
            return _check_file(official, file, folder, endpoint)
        return _fetch_file(official, file, folder, endpoint, token)

    paths = [get(file) for file in official.files]
    index = folder / "model.safetensors.index.json"
    if index in paths:
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(_is_plain(s) for s in shards.values()):
            raise UserError(f"{index}: no weight_map of plain file names; do not trust it")
        for shard in sorted(set(shards.values())):
            paths.append(get(shard))
    return paths


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.-]+\.safetensors", name))


def _check_file(official: Official, file: str, folder: Path, endpoint: str | None) -> Path:
    path, known = folder / file, official.sha256.get(file)
    if not path.exists():
        raise UserError(_no_network(official, file, folder, endpoint, "not here, and --offline"))
    if known is not None and sha256_of(path) != known:
        raise UserError(f"{path}: SHA-256 is not that of the published file; fetch it again")
    check_readable(path)
    return path


def _fetch_file(official: Official, file: str, folder: Path, endpoint, token) -> Path:
    # tries again by itself, five times and more: a silent hub is given up after half a minute
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "4")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "4")
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    where = f"{official.repo}/{file}"
    try:
        url = hf_hub_url(official.repo, file, endpoint=endpoint)
        told = get_hf_file_metadata(url, token=token).etag or ""
        with _patience():
            path = Path(hf_hub_download(
                official.repo, file, local_dir=folder, endpoint=endpoint, token=token
            ))  # fmt: skip
    except errors.GatedRepoError:
        raise UserError(
            f"{where}: a gated model; accept its licence on its page, make a token in your "
            "account's settings, then run `hf auth login` or give --token"
        ) from None
    except errors.LocalEntryNotFoundError:
        why = "the hub cannot be reached"
        raise UserError(_no_network(official, file, folder, endpoint, why)) from None
    except errors.OfflineModeIsEnabled:
        why = "HF_HUB_OFFLINE forbids asking the hub; unset it"
        raise UserError(_no_network(official, file, folder, endpoint, why)) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise UserError(
            f"{where}: the hub answered {status}; check --endpoint and --token, or try later"
        ) from None
    except Exception as error:  # of the HTTP library that the hub's client uses, or of the disk
        if isinstance(error, OSError) and error.errno in DISK:
            raise UserError(f"{folder / file}: {error.strerror}; check rights and space") from None
        broke = isinstance(error, ConnectionError)
        why = "the connection broke too often" if broke else "the hub cannot be reached"
        why += f" or does not answer as one ({type(error).__name__})" if not broke else ""
        raise UserError(_no_network(official, file, folder, endpoint, why)) from None
    known = official.sha256.get(file, told if len(told) == 64 else None)
    if known is not None and sha256_of(path) != known:
        path.unlink()
        raise UserError(
            f"{path}: SHA-256 is not that of the published file, removed; run the command again"
        )
    try:
        check_readable(path)
    except UserError:  # a page that a hotel's network shows in place of every file
        path.unlink()
        raise
    return path


class _Patience(logging.Handler):
    """Ends a download whose connection has broken BREAKS times: the hub's client goes on for as
    long as a byte comes each time, for ever where a length is wrong. It tells by log lines."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.breaks = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.breaks += record.getMessage().startswith("Error while downloading")
        if self.breaks > BREAKS:
            raise ConnectionError("it broke too often")


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    log, handler = logging.getLogger("huggingface_hub.file_download"), _Patience()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _no_network(
    official: Official, file: str, folder: Path, endpoint: str | None, why: str
) -> str:
    """One line with all that is needed to get the file by hand."""
    from huggingface_hub import hf_hub_url

    known = official.sha256.get(file)
    check = f" (SHA-256 {known})" if known else ""
    url = hf_hub_url(official.repo, file, endpoint=endpoint)
    return (
        f"{official.repo}/{file}: {why}; go online and run the command again, or put {url}{check} "
        f"into {folder} by hand"
    )


def sha256_of(path: Path) -> str:
    """The file's SHA-256, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
