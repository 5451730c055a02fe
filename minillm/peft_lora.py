"""LoRA in PEFT's layout, both ways: adapter_config.json and adapter_model.safetensors."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.adapt.lora import add_lora, lora_layers
from minillm.adapt.lora_linear import LORA
from minillm.adapt.lora_parts import LoRAParts
from minillm.errors import UserError
from minillm.files import Fields
from minillm.weights import LazyTensor, add_once, check_names, rope_halves, rope_to_halves

ROOT = "base_model.model."
# settings of PEFT that change what the numbers mean, with the values that do not
UNSUPPORTED = {
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "init_lora_weights": (True, False, None, "gaussian"),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}


def lora_files(model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], dict, dict]:
    """What PEFT's two files hold of a model's LoRA, and what minillm.json adds to them.

    Rows of lora_B on wq and wk are permuted as the base's rows are; slices of a fused layer become
    one update of their ranks' sum, and updates of a smaller rank are filled up with zeros, for
    PEFT has one rank for all. Errors: UserError if layers differ in scale or dropout.
    """
    layers = lora_layers(model)
    kinds = {(m.lora_scaling, m.lora_dropout.p) for m in layers.values()}
    if len(kinds) > 1:
        raise UserError(f"{folder}: LoRA layers differ in scale or dropout; make them equal")
    scaling, dropout = kinds.pop()
    rank = max(len(m.lora_A) for m in layers.values())
    names, tensors = model.hf_names(), {}
    for name, layer in layers.items():
        hf, heads = names[name]
        a, b = layer.factors()
        missing = rank - len(a)
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        tensors[f"{ROOT}{hf}.lora_A.weight"] = a
        tensors[f"{ROOT}{hf}.lora_B.weight"] = rope_to_halves(b, heads) if heads else b
    settings = {
        "peft_type": "LORA", "r": rank, "lora_dropout": dropout,
        "lora_alpha": _alpha(scaling, rank),
        "target_modules": sorted(_targets({names[n][0] for n in layers}, names)),
        "bias": "none", "fan_in_fan_out": model.FAN_IN_FAN_OUT,
    }  # fmt: skip
    notes = {
        "parts": {n: m.adapted_parts for n, m in layers.items() if isinstance(m, LoRAParts)},
        "ranks": {n: len(m.lora_A) for n, m in layers.items() if len(m.lora_A) < rank},
    }
    return tensors, settings, notes


def _alpha(scaling: float, rank: int) -> float:
    """What is divided by the rank to the same scaling: 7 rather than 7.000000000000001."""
    short = float(f"{scaling * rank:.15g}")
    return short if short / rank == scaling else scaling * rank


def _targets(adapted: set[str], names: dict[str, tuple[str, int]]) -> Iterable[str]:
    """Last words ("q_proj") where these name exactly the adapted layers, else whole names."""
    words = {name.rpartition(".")[2] for name in adapted}
    meant = {hf for hf, _ in names.values() if hf.rpartition(".")[2] in words}
    return words if meant == adapted else adapted


def load_lora(
    model: nn.Module, folder: Path, file: Path, found: dict[str, LazyTensor], notes: dict
) -> None:
    """Adds a PEFT adapter's LoRA to a plain model, with its numbers.

    Errors: UserError for damaged files, a setting that is not plain LoRA, a layer the model does
    not have, or another shape; the model is then as it was.
    """
    settings = _read_config(folder / "adapter_config.json")
    tensors = _in_our_names(found, model, file)
    names = sorted({key.rpartition(".")[0] for key in tensors})
    modules = dict(model.named_modules())
    expected = {}
    for name in names:
        if not isinstance(modules.get(name), nn.Linear):
            raise UserError(f"{file}: the model has no linear {name}; load it with what it had")
        linear, rank = modules[name], settings["rank"]
        expected[f"{name}.lora_A"] = (rank, linear.in_features)
        expected[f"{name}.lora_B"] = (linear.out_features, rank)
    check_names(expected, {key: lazy.shape for key, lazy in tensors.items()}, file)
    _check_targets(settings["targets"], model, names, file)
    parts, ranks = _read_shape(folder, notes, modules, names, settings["rank"])
    for name in names:
        smaller, rank = min(modules[name].weight.shape), ranks.get(name, settings["rank"])
        if rank > smaller and name not in parts:
            raise UserError(f"{file}: LoRA of rank {rank} on {name}, whose smaller side is "
                            f"{smaller}; not supported")  # fmt: skip
    factors = {}
    for key, lazy in tensors.items():  # all of them before the model is changed
        dtype = modules[key.rpartition(".")[0]].weight.dtype
        factors[key] = torch.empty(expected[key], dtype=torch.promote_types(dtype, torch.float32))
        lazy.write_to(factors[key])
    for name, rank in ranks.items():
        if factors[f"{name}.lora_B"][:, rank:].any():  # of what only fills up there is nothing
            raise UserError(f"{folder / 'minillm.json'}: the rank of {name} is more than {rank} in "
                            f"{file.name}; save again")  # fmt: skip
    try:
        for name in names:
            own, rank = parts.get(name, []), ranks.get(name, settings["rank"])
            share = rank // max(1, len(own))
            alpha = settings["alpha"] / settings["rank"] * share
            slices = [f"{name}.{part}" for part in own]
            add_lora(model, slices or [name], share, alpha, settings["dropout"])
            a, b = (factors[f"{name}.{factor}"] for factor in LORA)
            model.get_submodule(name).set_factors(a[:rank], b[:, :rank])
    except UserError as error:  # such as LoRA that is there already: no layer changes
        for name in names:
            model.set_submodule(name, modules[name])
        raise UserError(f"{file}: {error}") from None
    model.train(model.training)


def _check_targets(targets: list, model: nn.Module, names: list[str], file: Path) -> None:
    """Errors: UserError if the file lacks a layer that one of the targets names."""
    modules = dict(model.named_modules())
    lost = [
        name for name, (hf, _) in model.hf_names().items()
        if name not in names and isinstance(modules.get(name), nn.Linear)
        and any(f".{hf}".endswith(f".{target}") for target in targets)
    ]  # fmt: skip
    if lost:
        raise UserError(f"{file}: nothing for {', '.join(lost[:5])}, which the config names; copy "
                        "the adapter again, or load as many layers as it has")  # fmt: skip


def _read_shape(
    folder: Path, notes: dict, modules: dict, names: list[str], file_rank: int
) -> tuple[dict, dict]:
    """minillm.json's {module: slices} and {module: rank, where below the file's}. Errors: UserError
    unless the model has those slices and they share their rank."""
    parts, ranks = notes.get("parts") or {}, notes.get("ranks") or {}
    is_sound = isinstance(parts, dict) and isinstance(ranks, dict) and all(
        name in names and isinstance(own, list) and own
        and set(map(str, own)) <= set(getattr(modules[name], "parts", ()))
        for name, own in parts.items()
    ) and all(
        name in names and type(rank) is int and 0 < rank <= file_rank
        for name, rank in ranks.items()
    )
    if not is_sound or any(ranks.get(n, file_rank) % len(own) for n, own in parts.items()):
        raise UserError(f"{folder / 'minillm.json'}: parts or ranks fit no such layer; save again")
    return parts, ranks


def _in_our_names(found: dict[str, LazyTensor], model: nn.Module, file: Path) -> dict:
    """PEFT's tensors under our names, rows of lora_B on wq and wk back in neighbouring pairs."""
    ours = {hf: (name, heads) for name, (hf, heads) in model.hf_names().items()}
    tensors, modules = {}, dict(model.named_modules())
    for key, lazy in found.items():
        module, factor, end = _split(key)
        name, heads = ours.get(module, (None, 0))
        if factor == "base_layer":  # beside LoRA on a head PEFT writes the head itself
            if name not in modules:
                raise UserError(f"{file}: {key} is of a layer that this model has not as one of "
                                "its own, such as a head that is its embedding; not supported")
            _check_same(lazy, getattr(modules[name], end, None), key)
            continue
        if factor not in LORA:
            raise UserError(f"{file}: {key} is more than LoRA on linear layers; not supported")
        if name is None or end != "weight":
            raise UserError(f"{file}: {key} belongs to no layer of this model; a wrong base?")
        if heads and factor == "lora_B":
            lazy = lazy.through(lambda out, heads=heads: rope_halves(out, heads))
        add_once(tensors, f"{name}.{factor}", lazy, key)
    if not tensors:
        raise UserError(f"{file}: holds no tensors; save the adapter again")
    return tensors


def _check_same(lazy: LazyTensor, weight: Tensor | None, key: str) -> None:
    """Errors: UserError if a tensor written beside its LoRA is not the base's, but for rounding to
    16 bits."""
    if weight is not None and weight.shape == lazy.shape:
        lazy.write_to(beside := torch.empty_like(weight))
        if torch.allclose(beside, weight, rtol=2**-7, atol=1e-6):
            return
    raise UserError(f"{lazy.source}: {key} is not this base's; load the base that it has, or save "
                    "the adapter without it")  # fmt: skip


def _split(key: str) -> tuple[str, str, str]:
    """base_model.model.X.lora_A.weight -> X, lora_A, weight."""
    parts = key.removeprefix(ROOT).rsplit(".", 2)
    return tuple(parts) if len(parts) == 3 else (key, "", "")


def _read_config(path: Path) -> dict:
    """add_lora's rank, alpha and dropout from an adapter_config.json; and the targets, all of whose
    layers the file must have: those of a list that nothing narrows down."""
    config = Fields(path)
    for field, harmless in UNSUPPORTED.items():
        if config.content.get(field) not in harmless:
            value = config.content[field]
            raise UserError(f"{path}: {field} {value!r} is not supported; use plain LoRA")
    dropout = config.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"{path}: lora_dropout is {dropout!r}, not from 0 to below 1; fix it")
    alpha = config.number("lora_alpha")
    targets = config.get("target_modules")
    narrowed = ("layers_to_transform", "exclude_modules", "target_parameters")
    if not isinstance(targets, list) or any(config.get(f) not in (None, [], {}) for f in narrowed):
        targets = []
    return {
        "rank": config.whole("r"), "alpha": alpha, "dropout": float(dropout), "targets": targets,
    }  # fmt: skip
