"""What the loaders and writers of all models share, beside the files themselves (weights.py)."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minillm.errors import UserError
from minillm.files import Fields, write_json
from minillm.memory import check_fits
from minillm.weights import LazyTensor, write_safetensors


class _SkipInit(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def empty_model(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, on the meta device: names and shapes, no memory, no random numbers.

    Initialisation is skipped, not only pointless: on meta it makes PyTorch import its compiler
    (820 modules, 70 MiB, a second).
    """
    with torch.device("meta"), _SkipInit():
        return build()


def materialize(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Random weights, drawn in `dtype` on `device`, for a model built on the meta device; on that
    device, nothing is drawn."""
    n_numbers = sum(parameter.numel() for parameter in model.parameters())
    check_fits("random weights", n_numbers * dtype.itemsize, device)
    model.to(dtype)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        model.init_weights()
    return model


def keep_first_layers(
    tensors: dict[str, LazyTensor], blocks: str, have: int, wanted: int
) -> dict[str, LazyTensor]:
    """Without the tensors of all but the first `wanted` of `have` layers, which `blocks` ("layers")
    names."""
    number = re.compile(rf"{blocks}\.(\d+)\.")
    return {
        name: lazy
        for name, lazy in tensors.items()
        if not ((m := number.match(name)) and wanted <= int(m[1]) < have)
    }


def is_copy(head: LazyTensor, embedding: LazyTensor | None) -> bool:
    """Whether the head that lies beside a tied embedding is that embedding once more. Where it is
    not, the file is right and its config wrong, as for transformers: warns, and the head counts."""
    if embedding is None or head.shape != embedding.shape:
        same = False
    else:
        tensors = torch.empty(head.shape), torch.empty(head.shape)
        head.write_to(tensors[0])
        embedding.write_to(tensors[1])
        same = torch.equal(*tensors)
    if not same:
        print(f"warning: {head.source}: lm_head.weight is not the embedding that the config "
              "ties it to; it is loaded as it is", file=sys.stderr)  # fmt: skip
    return same


def check_tokenizer(tokenizer, vocab_size: int, where: str | Path) -> None:
    """Warns if there is none. Errors: UserError if ids would not fit the embedding, or most of it
    would never be used (some models pad their vocabulary, by less than 1,024 rows)."""
    if tokenizer.is_bytes:
        use = "text is taken as bytes, which suits no model trained otherwise"
        if tokenizer.vocab_size > vocab_size:  # its ids can still be computed with
            use = f"it has {vocab_size} ids, too few for text taken as bytes"
        print(f"warning: {where}: no tokenizer beside it; {use} (add --tokenizer)", file=sys.stderr)
        return
    _check_settings(tokenizer, Path(where))
    more = vocab_size - tokenizer.vocab_size
    is_wrong = not 0 <= more < 1024
    if more and Path(tokenizer.path).suffix in (".bin", ".tiktoken"):  # which may end anywhere
        is_wrong |= not any(vocab_size % unit == 0 and more < unit for unit in (64, 128))
        if not is_wrong:
            print(f"warning: {tokenizer.path}: {tokenizer.vocab_size} pieces for the {vocab_size} "
                  "of the model: cut, unless those are padded", file=sys.stderr)  # fmt: skip
    if is_wrong:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} pieces, the model {vocab_size}; "
            f"give the one it was trained with by --tokenizer, in place of {tokenizer.path}"
        )


def _check_settings(tokenizer, folder: Path) -> None:
    """Warns where a model's folder has another token for the end. Errors: UserError where the
    tokenizer's own says that texts begin otherwise."""
    path = Path(tokenizer.path)
    beside = path if path.is_dir() else path.parent
    settings = beside / "tokenizer_config.json"
    space = Fields(settings).get("add_prefix_space") if settings.exists() else None
    if space not in (None, tokenizer.adds_space):
        raise UserError(f"{settings}: add_prefix_space {space} is not this kind of tokenizer's; "
                        "not supported")  # fmt: skip
    config = folder / "config.json"
    end = Fields(config).get("eos_token_id") if config.exists() else None
    if end is not None and tokenizer.eos_id not in (end if isinstance(end, list) else [end]):
        print(f"warning: {config}: eos_token_id {end} is not the tokenizer's {tokenizer.eos_id}, "
              "where answers end", file=sys.stderr)  # fmt: skip


def check_text(tokenizer, vocab_size: int, where: str | Path) -> None:
    """Errors: UserError where text would become ids that the model has not: it was loaded without a
    tokenizer, and has fewer ids than there are bytes."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{where}: no tokenizer beside it, and as bytes text has ids that the "
                        f"model, with {vocab_size}, has not; add --tokenizer")  # fmt: skip


def check_saveable(model: nn.Module, folder: Path) -> None:
    """Errors: UserError if the model carries what a plain one of its config does not (LoRA,
    adapters, added biases): that is saved by save_adapter."""
    plain = empty_model(lambda: type(model)(model.config)).state_dict().keys()
    more = [name for name in model.state_dict() if name not in plain]
    if any(".lora_" in name for name in more):
        raise UserError(f"{folder}: the model has LoRA layers; keep them by "
                        "minillm.peft_format.save_adapter, or fold them in by "
                        "minillm.adapt.lora.fold_lora first")  # fmt: skip
    if more:
        raise UserError(f"{folder}: {more[0]} is in no plain model's file; save_adapter instead")


def write_hf(
    folder: Path, model: nn.Module, tokenizer, tensors: dict[str, Tensor], config: dict,
    of_tokenizer: dict | None = None,
) -> None:  # fmt: skip
    """A Hugging Face folder of these tensors: config.json with what all models say in it, the
    tokenizer's files (tokenizer_config.json with `of_tokenizer`), model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    write_json(folder / "config.json", config | {
        "tie_word_embeddings": model.config.tied_head, "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id, "dtype": dtype, "torch_dtype": dtype,
    })  # fmt: skip
    tokenizer.save(folder)
    if of_tokenizer is not None:
        write_json(folder / "tokenizer_config.json", of_tokenizer)
    write_safetensors(folder / "model.safetensors", tensors)
