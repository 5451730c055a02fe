"""A run's folder: settings, metrics.jsonl, the two newest checkpoints and the best one.

A checkpoint is one file, written atomically: all or nothing by construction, so the newest one
that reads back is the truth. One process at a time holds the folder.
"""

import contextlib
import itertools
import json
import os
import pickle
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from minillm.errors import UserError
from minillm.files import atomic_file, lock_folder, read_json, unlock_folder, write_json

# settings that decide what is trained and on what: another one is another run
OF_MODEL_OR_DATA = {"checkpoint", "init", "layers", "tokenizer", "method", "add-biases", "untie",
                    "task", "data", "template", "samples", "held-out", "max-length",
                    "skip-bad"}  # fmt: skip


class Run:
    """The folder of one run, held by this process for as long as the object lives.

    `identity` are hashes of what the run is about ("model", "data"), or several by name: a resumed
    one must have the same, or one of them. `made_with` is what the bits of a result depend on
    beside PyTorch and threads: resuming with another prints a warning. `override` lets it go on
    with other settings. Without `keeps_weights`, train() writes neither checkpoints nor the best.
    Errors: UserError if the folder exists and neither resume nor overwrite, if another process
    holds it or it cannot be written to, or if a resumed run is not the one that began, or came to
    its end and left no checkpoint.
    """

    def __init__(
        self,
        folder: str | Path,
        config: dict,
        resume: bool = False,
        overwrite: bool = False,
        wandb_project: str | None = None,
        identity: dict[str, str | dict] | None = None,
        override: bool = False,
        keeps_weights: bool = True,
        made_with: dict[str, str] | None = None,
    ):
        self.folder = Path(folder)
        self.config = config
        here = {"torch": str(torch.__version__), "threads": str(torch.get_num_threads())}
        self.made_with = here | (made_with or {})
        self.keeps_weights = keeps_weights
        self.metrics = self.folder / "metrics.jsonl"
        self.identity = identity or {}
        self._lock: Path | None = None
        check_folder(self.folder, resume, overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder)
        for path in self.folder.rglob(".*.tmp.*"):  # of a killed process
            path.unlink()
        if overwrite:  # log and settings are written anew, not removed: a kill in here leaves a
            for path in [*self.folder.iterdir()]:  # run that can be resumed or overwritten
                if _is_own(path) or path.name == "config.json":
                    continue
                is_folder = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if is_folder else path.unlink()
        self.began = config
        if resume:
            self._check_goes_on()
            self.began = check_settings(self.folder, config, override)
        self.metrics.touch()
        if overwrite:
            self.metrics.write_text("")
        if not resume:
            self.write_settings()
        self.wandb = _start_wandb(wandb_project, self.folder.name, config)

    def __del__(self):
        if getattr(self, "_lock", None) is not None:
            unlock_folder(self._lock)

    def write_settings(self) -> None:
        """Writes config.json. A resumed run's only when all of it has been put back: one that is
        refused stays as it was."""
        write_json(self.folder / "config.json", self.config)

    def _check_goes_on(self) -> None:
        """A run that was stopped before its first checkpoint begins again; one that came to its end
        without any would lose its log by that."""
        if self._checkpoints():
            return
        if (self.folder / "summary.json").exists():
            raise UserError(f"{self.folder}: complete, and without a checkpoint to go on from; add "
                            "--overwrite to train again, or name another --out-dir")  # fmt: skip
        print(f"{self.folder}: stopped before its first checkpoint; it begins again", flush=True)

    def log(self, row: dict) -> None:
        """Appends one line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.wandb is not None:
            self.wandb.log(row, step=row["step"])

    def rows(self) -> list[dict]:
        """All complete lines of metrics.jsonl."""
        return read_metrics(self.metrics)

    def last_row(self, step: int) -> dict:
        """The line of the newest step; its number alone, where the line was lost."""
        return next((row for row in self.rows()[-1:] if row["step"] == step), {"step": step})

    def replace_last(self, row: dict) -> None:
        """Writes the line of the newest step anew; nothing where the line was lost."""
        *before, last = self.rows() or [{"step": 0}]
        if last["step"] == row["step"]:
            self._write_rows([*before, row])

    def _write_rows(self, rows: list[dict]) -> None:
        with atomic_file(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def save(self, state: dict, step: int) -> Path:
        """Writes step_N.pt (plain types and tensors) and keeps the newest two."""
        path = self.folder / f"step_{step:06d}.pt"
        about = {"identity": self.identity, "versions": self.made_with}
        with atomic_file(path, _n_bytes(state)) as temporary:
            torch.save(state | about, temporary)
        for old in self._checkpoints()[2:]:
            old.unlink()
        return path

    def save_best(self, weights: dict, step: int) -> None:
        """Writes best.pt, the trainable weights with the lowest held-out loss so far, and of which
        step they are."""
        with atomic_file(self.folder / "best.pt", _n_bytes(weights)) as temporary:
            torch.save({"weights": weights, "step": step}, temporary)

    def newest(self, besides: int | None = None) -> Path | None:
        """The newest checkpoint besides that of a step, if there is one."""
        left_out = None if besides is None else f"step_{besides:06d}.pt"
        return next((path for path in self._checkpoints() if path.name != left_out), None)

    def load_best(self, step: int) -> dict:
        """The weights that save_best wrote at this step. Errors: UserError if they are damaged, or
        of a step that was taken again after a crash."""
        path = self.folder / "best.pt"
        try:
            kept = _load_checked(path)
            found, weights = step, kept  # older runs kept the weights alone
            if "step" in kept:
                found, weights = kept["step"], kept["weights"]
        except DAMAGE as error:
            raise UserError(f"{path}: damaged ({type(error).__name__}); train again") from None
        if found != step:
            raise UserError(f"{path}: is of step {found}, which a crash undid; train again")
        return weights

    def load_newest(self) -> dict | None:
        """The newest checkpoint that reads back, or None; metrics.jsonl is cut back to its step
        (to nothing, if there is none).

        Errors: UserError if there are checkpoints and none is whole, or the newest is of another
        model or other data.
        """
        paths, damaged = self._checkpoints(), []
        for path in paths:
            try:
                state = _load_checked(path)
                step = int(state["step"])
            except DAMAGE:
                print(f"warning: {path}: damaged; trying the one before it", file=sys.stderr)
                damaged.append(path)
                continue
            self._check_identity(path, state)
            self._write_rows([row for row in self.rows() if row["step"] <= step])
            for bad in damaged:  # no longer the newest
                bad.rename(bad.with_name(f"{bad.name}.damaged"))
            return state
        if paths:
            raise UserError(f"{self.folder}: every checkpoint is damaged; use --overwrite")
        self.metrics.write_text("")  # nothing was saved: the run begins again
        return None

    def _check_identity(self, path: Path, state: dict) -> None:
        for name, now in self.identity.items():
            if not _agree(state.get("identity", {}).get(name, now), now):
                raise UserError(f"{path}: trained with another {name} than this (or an earlier "
                                f"version's split of it); resume with the {name} it began with, or "
                                "start another run")  # fmt: skip
        before, now = state.get("versions", {}), self.made_with
        for name in now:
            if before.get(name, now[name]) != now[name]:
                print(f"warning: {path}: made with {name} {before[name]}, here it is {now[name]}: "
                      "not bit-identical to a run never stopped", file=sys.stderr)  # fmt: skip

    def _checkpoints(self) -> list[Path]:
        numbers = {path: path.stem.removeprefix("step_") for path in self.folder.glob("step_*.pt")}
        found = [path for path, number in numbers.items() if number.isdecimal()]
        return sorted(found, key=lambda path: int(numbers[path]), reverse=True)


def check_folder(folder: str | Path | None, resume: bool, overwrite: bool) -> None:
    """Errors: UserError if it holds a run and neither is said, or none to resume, or something
    else; a fresh one (None) has nothing to resume."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one of them")
    if not folder:
        if resume:
            raise UserError("--resume: no run is named; add --out-dir FOLDER")
        return
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{there}: not a folder; name another --out-dir")
    # a model's folder has a config.json too: only a run has metrics beside it
    known = (folder / "config.json").exists() and (folder / "metrics.jsonl").exists()
    if known and not (resume or overwrite):
        raise UserError(
            f"{folder}: a run is there already; add --resume to continue it, --overwrite to "
            "replace it, or name another --out-dir"
        )
    elif resume and not known:
        raise UserError(f"{folder}: no run to resume; check --out-dir or drop --resume")
    elif not known and folder.is_dir() and any(not _is_own(path) for path in folder.iterdir()):
        raise UserError(f"{folder}: a folder of something else; name another --out-dir")


def check_settings(folder: Path, now: dict, override: bool) -> dict:
    """The settings that the run in the folder began with. Errors: UserError for another one now,
    unless told so: all but its length, place, reports."""
    before = read_json(folder / "config.json")
    free = {"max-iters", "epochs", "eval-every", "patience", "save", "keep-last", "save-every",
            "no-save", "wandb-project"}  # fmt: skip
    if not isinstance(before, dict):
        raise UserError(f"{folder / 'config.json'}: no settings of a run; use --overwrite")
    # a flag that did not exist when the run began had no part in it
    for name in now:
        if name in free or before.get(name, now[name]) == now[name]:
            continue
        with_ = f"without --{name}" if before[name] is None else f"with --{name} {before[name]}"
        what = f"{folder}: began {with_}, not {now[name]}"
        if name in ("batch-size", "accumulation-steps", "seed"):
            what += " (of this epoch's samples some will be met twice or not at all)"
        remedy = f"resume with the same settings (--config {folder / 'config.json'})"
        if name in ("checkpoint", "data", "tokenizer"):
            remedy += ", add --override if it only lies elsewhere now"
        elif name not in OF_MODEL_OR_DATA:
            remedy += ", add --override to go on with these"
        if not override:
            raise UserError(f"{what}; {remedy}, or start another run")
        print(f"warning: {what}", file=sys.stderr)
    return before


def _agree(before: str | dict, now: str | dict) -> bool:
    """Whether two hashes, or one of two by name, are the same (older runs kept one of the two)."""
    if isinstance(now, dict):
        known = before.items() if isinstance(before, dict) else [("bfloat16", before)]
        return any(now.get(name) == value for name, value in known)
    return before == now


def _start_wandb(project: str | None, name: str, config: dict):
    """A Weights & Biases run, or None where none is wanted or the package is not installed."""
    if project is None:
        return None
    try:
        import wandb
    except ImportError:
        print("warning: --wandb-project: wandb is not installed (pip install wandb); going on with "
              "metrics.jsonl alone", file=sys.stderr)  # fmt: skip
        return None
    try:
        return wandb.init(project=project, name=name, config=config)
    except Exception as error:  # not logged in, or no network: nothing to lose a run for
        print(f"warning: --wandb-project: {error}; going on with metrics.jsonl alone",
              file=sys.stderr)  # fmt: skip
        return None


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, none if it is missing; one cut short by a crash is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def fresh_folder(root: str | Path, name: str) -> Path:
    """Makes the first of root/name-001, root/name-002, ... that no process has made."""
    Path(root).mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = Path(root) / f"{name}-{number:03d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


# what torch.load and zipfile raise for damaged files, but not lack of memory or of rights
DAMAGE = (RuntimeError, ValueError, LookupError, TypeError, EOFError, AttributeError,
          pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, NotImplementedError)  # fmt: skip


def _load_checked(path: Path) -> dict:
    """A file of torch.save, its checksums checked: torch.load does not. Errors: one of DAMAGE."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError("checksum")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "can't allocate" in str(error) or "out of memory" in str(error):
            raise MemoryError from None  # the file is not to blame
        raise


def _is_own(path: Path) -> bool:
    """What a run that was killed before it was complete may have left."""
    return path.name in ("metrics.jsonl", ".lock") or ".tmp." in path.name


def _n_bytes(state: dict) -> int:
    """What the tensors in it take, and some for the rest."""
    return 2**16 + sum(x.nbytes for x in tree_leaves(state) if torch.is_tensor(x))
