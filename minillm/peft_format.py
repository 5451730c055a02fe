"""What a method trained, saved alone and put back onto its base: LoRA, soft prompts and prefixes in
PEFT's layout, both ways; biases, layers and bottleneck adapters, which PEFT has no files for, as
their tensors under our names.

minillm.json beside them has the fingerprints of the base and of the tokenizer, the prompt template
and the settings of the training.
"""

from pathlib import Path

from torch import nn

from minillm.adapt.bottleneck import AdapterLinear
from minillm.adapt.lora import lora_layers
from minillm.adapt.lora_linear import LORA
from minillm.adapt.methods import untie_head
from minillm.adapt.prompts import PrefixTuning, SoftPrompt
from minillm.errors import UserError
from minillm.files import Fields, write_json
from minillm.fingerprint import fingerprint, tokenizer_fingerprint
from minillm.linear import is_plain
from minillm.peft_lora import load_lora, lora_files
from minillm.peft_prompts import PREFIX, PROMPT, load_prompt, prompt_files
from minillm.weights import LazyTensor, check_names, open_weights, write_safetensors

TENSORS = "TENSORS"  # our own kind, beside PEFT's


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base_name: str | None = None,
    template: dict | None = None,
    method: str | None = None,
    tokenizer=None,
    settings: dict | None = None,
) -> None:
    """Writes what is trained, not the base: adapter_model.safetensors, adapter_config.json (as
    PEFT's, where PEFT has the method) and minillm.json.

    LoRA may be merged or not. `base_name` is where the base is found again; `template` the prompt
    texts; `method` its name and `settings` the flags of the training, for the record. Errors:
    UserError if there is nothing to save, or LoRA layers differ in scale or dropout.
    """
    folder = Path(folder)
    base, notes = model, {}
    _check_complete(model, folder)
    if isinstance(model, SoftPrompt | PrefixTuning):
        base = model.model
        tensors, config = prompt_files(model)
    elif lora_layers(model):
        tensors, config, notes = lora_files(model, folder)
    else:
        tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        config = {"peft_type": TENSORS}
        if not tensors or len(tensors) == len([*model.parameters()]):
            raise UserError(f"{folder}: no LoRA or other method to save; adapt the model first")
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", config | {
        "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True,
    })  # fmt: skip
    write_json(folder / "minillm.json", notes | {
        "base": base_name, "layers": base.config.n_layers, "method": method,
        "base_fingerprint": fingerprint(base, tensors.keys()),
        "tokenizer_fingerprint": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "template": template, "settings": settings, "merged": False, "tensors": sorted(tensors),
    })  # fmt: skip


def _check_complete(model: nn.Module, folder: Path) -> None:
    """Errors: UserError for what the files would leave out: tensors trained beside LoRA, LoRA or a
    trainable base under a soft prompt or prefix, that a layer is switched off; and for what would
    not be read back."""
    layers = lora_layers(model)
    is_wrapped = isinstance(model, SoftPrompt | PrefixTuning)
    if not layers and is_wrapped and any(p.requires_grad for p in model.model.parameters()):
        raise UserError(f"{folder}: the base under the soft prompt or prefix is trainable too, and "
                        "would not be saved; freeze it (requires_grad_(False)) first")  # fmt: skip
    if not layers:
        return
    others = [p for name, p in model.named_parameters() if not name.endswith(LORA)]
    some_trained = len({p.requires_grad for p in others}) == 2  # all: nobody has marked any
    off = [name for name, layer in layers.items() if not layer.enabled]
    odd = [name for name, layer in layers.items() if not layer.lora_scaling > 0]
    if is_wrapped or some_trained:
        what = "LoRA and more is trained, and one adapter holds one method; save them apart"
    elif off:
        what = f"{off[0]} is switched off, which no file can say; switch it on"
    elif odd:
        what = f"{odd[0]} has an alpha that is not positive, which is not read back; change it"
    else:
        return
    raise UserError(f"{folder}: {what}")


def load_adapter(model: nn.Module, folder: str | Path, force: bool = False) -> nn.Module:
    """A plain model with an adapter's numbers, frozen: the model itself, with LoRA layers, other
    tensors or bottlenecks in place, or wrapped in a soft prompt or a prefix.

    An adapter made by PEFT has no fingerprint and is taken on trust. Errors: UserError for damaged
    files, a kind or setting that is not supported, a layer the model does not have, another shape,
    or (unless `force`) a base other than the one it was trained on.
    """
    folder = Path(folder)
    kind = Fields(folder / "adapter_config.json").get("peft_type")
    notes = read_notes(folder)
    file = weights_of(folder)
    tensors = open_weights([file])
    if lost := [name for name in notes.get("tensors", []) if name not in tensors]:
        raise UserError(f"{file}: lacks {', '.join(lost[:5])}, which minillm.json lists; copy the "
                        "adapter again")  # fmt: skip
    if not force:
        _check_base(model, notes, folder, set(tensors))
    if kind == "LORA":
        load_lora(model, folder, file, tensors, notes)
    elif kind in (PROMPT, PREFIX):
        model = load_prompt(model, kind, file, tensors)
    elif kind == TENSORS:
        load_tensors(model, file, tensors)
    else:
        raise UserError(
            f"{folder / 'adapter_config.json'}: peft_type {kind!r} is not supported; it may be "
            f"LORA, {PROMPT}, {PREFIX} or {TENSORS}"
        )
    return model.requires_grad_(False)


def weights_of(folder: Path) -> Path:
    """An adapter's file of weights; an older PEFT left a .bin."""
    file = folder / "adapter_model.safetensors"
    older = file.with_suffix(".bin")
    return older if older.exists() and not file.exists() else file


def load_tensors(model: nn.Module, file: Path, tensors: dict[str, LazyTensor]) -> None:
    """Puts trained tensors into their places, first making those that a plain model does not have:
    bottlenecks, biases, a head of its own. Errors: UserError for one that has no place."""
    if not tensors:
        raise UserError(f"{file}: no tensors in it; save the adapter again")
    for name, lazy in tensors.items():
        owner, _, leaf = name.rpartition(".")
        _make_place(model, owner, leaf, lazy, file)
    named = dict(model.named_parameters())
    parts = {f"{layer}.{name}" for layer, module in model.named_modules()
             if isinstance(module, AdapterLinear) for name, _ in module.named_parameters()
             if name.startswith(("down.", "up."))}  # fmt: skip
    wanted = parts | tensors.keys()
    expected = {name: tuple(p.shape) for name, p in named.items() if name in wanted}
    check_names(expected, {name: lazy.shape for name, lazy in tensors.items()}, file)
    for name, lazy in tensors.items():
        lazy.write_to(named[name].data)


def _make_place(model: nn.Module, owner: str, leaf: str, lazy: LazyTensor, file: Path) -> None:
    modules = dict(model.named_modules())
    layer = owner.removesuffix(".down")
    if owner == model.HEAD and model.config.tied_head:
        untie_head(model)
    elif layer != owner and is_plain(modules.get(layer)) and lazy.shape:
        model.set_submodule(layer, AdapterLinear.from_linear(modules[layer], lazy.shape[0]))
    elif leaf == "bias" and isinstance(modules.get(owner), nn.Linear):
        linear = modules[owner]
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


def read_notes(folder: Path) -> dict:
    """minillm.json beside an adapter, {} if PEFT wrote it. Errors: UserError if it is damaged."""
    path = Path(folder) / "minillm.json"
    if not path.exists():
        return {}
    notes = Fields(path)
    if not isinstance(notes.get("base_fingerprint", {}), dict):
        raise UserError(f"{path}: base_fingerprint is no table; save the adapter again")
    names = notes.get("tensors", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: tensors is no list of names; save the adapter again")
    return notes.content


def _check_base(model: nn.Module, notes: dict, folder: Path, trained: set[str]) -> None:
    known, n_layers = notes.get("base_fingerprint"), notes.get("layers", model.config.n_layers)
    if known is None:
        return
    if n_layers != model.config.n_layers:
        raise UserError(f"{folder}: trained on {n_layers} layers, not the {model.config.n_layers} "
                        "of this model: another base; load as many (--layers)")  # fmt: skip
    here = fingerprint(model, trained)
    if not any(known.get(dtype) == here[dtype] for dtype in here):
        raise UserError(
            f"{folder}: trained on another base than this model; load that base, "
            "or add --force if you know better"
        )
