"""Checkpoints by name: where they are on this machine, and how the official ones are fetched.

Sizes and hashes are those of the files as published; what has no hash here is checked by the hub's
own. Nothing is fetched unless tools/download.py is run.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from minillm.errors import UserError
from minillm.files import read_json

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


@dataclass(frozen=True)
class Official:
    """A model on the Hugging Face hub: its repository, files, and the known SHA-256 of some."""

    repo: str
    files: tuple[str, ...]
    sha256: dict[str, str] = field(default_factory=dict)
    gated: bool = False


_VOCAB = {
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_GPT2 = ("config.json", "vocab.json", "merges.txt", "model.safetensors")
_LLAMA = ("config.json", "tokenizer.model", "model.safetensors.index.json")
_PIECES = {"tokenizer.model": "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"}
_SMALL = {"model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"}

OFFICIAL = {
    "gpt2": Official("openai-community/gpt2", _GPT2, _VOCAB | _SMALL),
    **{
        name: Official(f"openai-community/{name}", _GPT2, _VOCAB)
        for name in ("gpt2-medium", "gpt2-large", "gpt2-xl")
    },
    **{
        f"llama-2-{size}": Official(f"meta-llama/Llama-2-{size}-hf", _LLAMA, _PIECES, gated=True)
        for size in ("7b", "13b", "70b")
    },
}


def find_checkpoint(name: str | Path) -> Path:
    """A path as it is, or the folder of that name among the checkpoints.

    Errors: UserError telling how to get what is not there.
    """
    here = Path(os.path.relpath(CHECKPOINTS))  # an adapter remembers its base by this path
    folder = CHECKPOINTS if here.parts[:1] == ("..",) else here
    for path in (Path(name), folder / name):
        if path.exists():
            return path
    if str(name) in OFFICIAL:
        raise UserError(f"{name}: not on this machine; run python tools/download.py {name}")
    raise UserError(f"{name}: no such file or folder; check the path")


def fetch(
    name: str, folder: Path, endpoint: str | None = None, token: str | None = None
) -> list[Path]:
    """Fetches an official checkpoint into `folder`, resuming what is there; returns its files.

    `endpoint` is another hub's address. Errors: UserError saying what to do about a gated model,
    a missing network, or a file whose SHA-256 is not the published one (it is removed).
    """
    if name not in OFFICIAL:
        raise UserError(f"{name}: unknown; known: {', '.join(OFFICIAL)}")
    official = OFFICIAL[name]
    paths = [_fetch_file(name, official, file, folder, endpoint, token) for file in official.files]
    index = folder / "model.safetensors.index.json"
    if index in paths:
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(_is_plain(s) for s in shards.values()):
            raise UserError(f"{index}: no weight_map of plain file names; do not trust it")
        for shard in sorted(set(shards.values())):
            paths.append(_fetch_file(name, official, shard, folder, endpoint, token))
    return paths


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")


def _fetch_file(name, official: Official, file: str, folder: Path, endpoint, token) -> Path:
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import hf_hub_download

    where = f"{official.repo}/{file}"
    try:
        path = Path(hf_hub_download(
            official.repo, file, local_dir=folder, endpoint=endpoint, token=token
        ))  # fmt: skip
    except hub_errors.GatedRepoError:
        raise UserError(
            f"{where}: a gated model; accept its licence on its page, make a token in your "
            "account's settings, then run `hf auth login` or give --token"
        ) from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.EntryNotFoundError) as error:
        if isinstance(error, hub_errors.LocalEntryNotFoundError):
            raise UserError(_no_network(where, folder, name)) from None
        raise UserError(f"{where}: not found on the hub; check --endpoint and --token") from None
    except OSError as error:
        if getattr(error, "errno", None) is not None and error.filename is not None:
            raise  # the disk, not the network
        raise UserError(_no_network(where, folder, name)) from None
    except Exception as error:
        if "Connect" not in type(error).__name__ and "Timeout" not in type(error).__name__:
            raise
        raise UserError(_no_network(where, folder, name)) from None
    known = official.sha256.get(file)
    if known is not None and sha256_of(path) != known:
        path.unlink()
        raise UserError(
            f"{path}: SHA-256 is not that of the published file, removed; run the command again"
        )
    return path


def _no_network(where: str, folder: Path, name: str) -> str:
    return (
        f"{where}: the hub cannot be reached; go online and run the command again (it resumes), "
        f"or copy the files of {name} into {folder} by hand"
    )


def sha256_of(path: Path) -> str:
    """The file's SHA-256, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
