"""Weight files: read safely and one tensor at a time, written atomically.

A checkpoint is described before any of it is loaded, as {name: LazyTensor}; a model family
renames, permutes and joins these descriptions, `assign_weights` checks them all against the
model and only then writes the numbers straight into place, without a second copy in between.
Pickle files are opened with weights_only=True, always.
"""

import os
import pickle
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minillm.errors import UserError
from minillm.files import atomic_file, check_readable, read_json
from minillm.memory import check_fits


@dataclass(frozen=True)
class LazyTensor:
    """A tensor still in its file: its shape, the file to blame, and `fill`, which writes its
    numbers into a tensor of that shape, in whatever dtype and place that one has."""

    shape: tuple[int, ...]
    source: Path
    fill: Callable[[Tensor], object]

    @classmethod
    def read_by(cls, load: Callable[[], Tensor], shape: tuple, source: Path) -> "LazyTensor":
        """A tensor that `load` reads (or maps), contiguous."""

        def fill(out: Tensor) -> None:
            value = load()
            if not value.is_floating_point():
                raise UserError(f"{source}: holds {value.dtype}, not the numbers of a plain "
                                "model; give one that is not quantized")  # fmt: skip
            out.copy_(value.view(out.shape))

        return cls(tuple(shape), source, fill)

    def through(self, view: Callable[[Tensor], Tensor], shape: tuple | None = None) -> "LazyTensor":
        """The same numbers in another order: written into `view` of the result, of `shape`."""
        return LazyTensor(shape or self.shape, self.source, lambda out: self.fill(view(out)))

    def write_to(self, out: Tensor) -> None:
        """`fill`, with the file named if it cannot be read. Errors: UserError."""
        try:
            self.fill(out)
            if not _is_finite(out):
                wide = torch.empty(out.shape, dtype=torch.float64)
                self.fill(wide)
                if _is_finite(wide):
                    raise UserError(f"{self.source}: holds numbers too large for {out.dtype}; use "
                                    "bf16 or fp32")  # fmt: skip
                raise UserError(f"{self.source}: holds NaN or infinite numbers; download it again")
        except (UserError, torch.OutOfMemoryError):
            raise
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise _damaged(self.source, error) from None


def _is_finite(x: Tensor) -> bool:
    # a NaN is both least and greatest; a sum would take an fp32 copy of 16 bits
    return not x.numel() or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def open_weights(files: Iterable[Path]) -> dict[str, LazyTensor]:
    """The tensors of .safetensors or pickled files by name, none loaded yet.

    Errors: UserError naming a file that is missing, damaged, or repeats another's tensor.
    """
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        check_readable(path)
        opened = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
        twice = sorted(tensors.keys() & opened.keys())
        if twice:
            other = tensors[twice[0]].source
            raise UserError(f"{path}: {twice[0]} is also in {other}; remove one of the files")
        tensors |= opened
    return tensors


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        file = safe_open(path, framework="pt")
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, RuntimeError, ValueError, OverflowError) as error:
        raise _damaged(path, error) from None
    return {
        name: LazyTensor.read_by(lambda name=name: file.get_tensor(name), shape, path)
        for name, shape in shapes.items()
    }


def _open_pickle(path: Path) -> dict[str, LazyTensor]:
    try:
        records = _records(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's of TorchScript; the error says what it is
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=bool(records))
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors, or no PyTorch file at all, and nothing "
                        "in it was run; give .safetensors or a state_dict") from None  # fmt: skip
    except Exception as error:  # torch.load raises a dozen kinds, few with the file's name
        raise _damaged(path, error) from None
    is_weights = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for name, value in state.items()
    )
    if not is_weights:
        raise UserError(f"{path}: no dictionary of tensors; give a file of weights")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in state.values()}
    # a mapped storage goes on into its neighbour where its own record is too short
    if records and Counter(s.nbytes() for s in storages.values() if s.nbytes()) - records:
        raise _damaged(path, ValueError("a record is not as long as its tensor"))
    return {
        name: LazyTensor.read_by(value.contiguous, value.shape, path)
        for name, value in state.items()
    }


def _records(path: Path) -> Counter:
    """How many records of each size a file of torch.save has; none if it cannot be mapped."""
    if not zipfile.is_zipfile(path):  # the format before
        return Counter()
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
    if any(file.compress_type != zipfile.ZIP_STORED for file in files):
        return Counter()
    return Counter(file.file_size for file in files if "/data/" in file.filename)


def _damaged(path: Path, error: Exception) -> Exception:
    if "CUDA error" in str(error) or "can't allocate" in str(error):
        return error  # the file is not to blame
    reason = " ".join(str(error).split())[:80] or type(error).__name__
    return UserError(f"{path}: truncated or corrupt ({reason}); download it again")


def open_hf_weights(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a Hugging Face folder, without the prefix that torch.compile leaves. Warns of
    an adapter that lies in the same folder, which transformers would apply."""
    files, shards = hf_weight_files(folder)
    if (folder / "adapter_config.json").exists():
        print(f"warning: {folder}: holds an adapter too, which is not part of the model; to use "
              f"it, add --adapter {folder}", file=sys.stderr)  # fmt: skip
    found = open_weights(files)
    for name, shard in shards.items():
        if name in found and found[name].source.name != shard:
            raise UserError(f"{folder}: the index says that {name} is in {shard}, it is in "
                            f"{found[name].source.name}; download the index again")  # fmt: skip
    tensors: dict[str, LazyTensor] = {}
    for key, lazy in found.items():
        add_once(tensors, key.removeprefix("_orig_mod."), lazy, key)
    return tensors


def add_once(tensors: dict[str, LazyTensor], name: str, lazy: LazyTensor, key: str) -> None:
    """Puts a file's tensor under another name than its key. Errors: UserError for the second one of
    that name: which of them counts, nobody could say."""
    if name in tensors:
        raise UserError(f"{lazy.source}: {key} is {name} a second time; remove one of them")
    tensors[name] = lazy


def hf_weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a Hugging Face folder: safetensors first, then .bin, whole or sharded;
    and which tensor is in which file, where an index says so.

    Errors: UserError when there are none, or the index names a file outside the folder.
    """
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).exists():
            return [folder / single], {}
        if not (folder / index).exists():
            continue
        content = read_json(folder / index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{folder / index}: no weight_map; download the index again")
        names, inside = sorted(set(map(str, shards.values()))), [folder.resolve()]
        if inside[0].parent.name == "snapshots":  # the hub's own cache: links to ../../blobs
            inside.append(inside[0].parent.parent / "blobs")
        for name in names:
            plain = name == os.path.basename(name) and name.isprintable()
            # realpath, because resolve() fails on links that lead in a circle
            if not plain or Path(os.path.realpath(folder / name)).parent not in inside:
                raise UserError(f"{folder / index}: {name!r} leaves the folder; do not trust it")
        return [folder / name for name in names], {k: str(v) for k, v in shards.items()}
    raise UserError(
        f"{folder}: no weights (model.safetensors, pytorch_model.bin, or consolidated.00.pth); "
        "check the path or download the model"
    )


def assign_weights(
    model: nn.Module,
    tensors: dict[str, LazyTensor],
    where: Path,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Streams tensors into a model built on the meta device, one at a time, cast to `dtype`; where
    `device` is meta, none is read.

    Memory: the model alone, as numbers go from file to place (and `tensors`, which may hold some,
    is emptied on the way). Errors: UserError naming every missing, unexpected and misshapen name
    before anything is loaded, and the file of a tensor that cannot be read.
    """
    expected = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in expected.items()}
    check_names(shapes, {name: lazy.shape for name, lazy in tensors.items()}, where)
    n_numbers = sum(parameter.numel() for parameter in expected.values())
    check_fits(str(where), n_numbers * dtype.itemsize, device)
    for name, parameter in expected.items():
        value, lazy = torch.empty(parameter.shape, dtype=dtype, device=device), tensors.pop(name)
        if not value.is_meta:
            lazy.write_to(value)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


def check_names(expected: dict[str, tuple], found: dict[str, tuple], where: Path) -> None:
    """Errors: UserError listing missing, unexpected and misshapen names together (ten of each)."""
    faults = []
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {tuple(found[name])}, the model's is {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    for title, names in (("missing", missing), ("unexpected", extra), ("misshapen", misshapen)):
        if names:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            faults.append(f"{title}: {', '.join(names[:10])}{more}")
    if faults:
        raise UserError(f"{where}: {'; '.join(faults)}; these are not this model's weights")


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors atomically, on the CPU and contiguous, tagged as PyTorch's."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})


def rope_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Rows in Meta's order (neighbours 2j, 2j+1 rotate together) seen in Hugging Face's (j and
    j + Dh/2): a view, so that writing through it translates the other way.

    Shapes: (n_heads * Dh, N) -> (n_heads, 2, Dh/2, N).
    """
    return weight.view(n_heads, -1, 2, weight.shape[1]).transpose(1, 2)


def rope_to_halves(weight: Tensor, n_heads: int) -> Tensor:
    """The rows copied from Meta's order to Hugging Face's. Shapes: (n_heads * Dh, N), kept."""
    return rope_halves(weight, n_heads).reshape(weight.shape)
