"""LoRA on a whole model: adding it, training it alone, reading it out, folding it in.

Source: Hu et al. 2021. The layer itself is in lora_linear.py.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor, nn

from minillm.adapt.lora_linear import LORA, LoRALinear
from minillm.adapt.lora_parts import LoRAParts
from minillm.errors import UserError
from minillm.linear import Linear, autocast_dtype, is_plain


def add_lora(
    model: nn.Module,
    targets: Iterable[str] = ("wq", "wv"),
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.05,
) -> int:
    """Replaces every linear layer whose name ends in a target; returns how many.

    "wq" means every module so called, "layers.0.attention.wq" that one; "q" the slice of that name
    in every fused layer that has one (its `parts`). Call mark_only_lora_as_trainable next. Errors:
    UserError naming the module, and nothing is changed, for a target that matches nothing, is no
    plain nn.Linear or has LoRA already, for a rank below 1 or above the smaller side of the matrix,
    an alpha that is no number or a dropout not from 0 to below 1.
    """
    if isinstance(targets, str):  # else each letter would be one
        raise UserError(f"LoRA targets {targets!r}: one text; give a list of names")
    if not math.isfinite(alpha) or not 0 <= dropout < 1:
        raise UserError(f"LoRA alpha {alpha}, dropout {dropout}: alpha must be a number, dropout "
                        "from 0 to below 1; change them")  # fmt: skip
    modules = dict(model.named_modules())
    found = _find_targets(modules, list(targets))
    for name, parts in found.items():
        _check_target(name, modules[name], parts, rank)
    for name, parts in found.items():
        if parts:
            layer = LoRAParts.from_fused(modules[name], parts, rank, alpha, dropout)
        else:
            layer = LoRALinear.from_linear(modules[name], rank, alpha, dropout)
        model.set_submodule(name, layer)
    return len(found)


def _find_targets(modules: dict[str, nn.Module], targets: list[str]) -> dict[str, list[str]]:
    """{module: the slices of it that are meant, none for all of it}. Errors: UserError."""
    if not all(targets) or not targets:
        raise UserError("LoRA targets: one without a name, or none; name layers, such as wq")
    places = {name: (name, None) for name in modules}
    for name, module in modules.items():
        places |= {f"{name}.{part}": (name, part) for part in getattr(module, "parts", ())}
    found: dict[str, list] = {}
    for target in targets:
        names = [n for n in places if n == target or n.endswith("." + target)]
        if not names:
            there = {n.split(".")[-1] for n, (m, _) in places.items()
                     if isinstance(modules[m], nn.Linear)}  # fmt: skip
            raise UserError(
                f"LoRA target {target!r} matches no layer; there are {', '.join(sorted(there))}"
            )
        for module, part in (places[name] for name in names):
            found.setdefault(module, []).append(part)
    for module, parts in found.items():
        if None in parts and set(parts) != {None}:
            raise UserError(f"{module}: named whole and in slices; choose one of the two")
    return {m: [part for part in parts if part is not None] for m, parts in found.items()}


def _check_target(name: str, module: nn.Module, parts: list[str], rank: int) -> None:
    if isinstance(module, LoRALinear) and module.is_lora():
        raise UserError(f"{name}: has LoRA already; add it once, to the plain model")
    if not is_plain(module) and not isinstance(module, LoRALinear):
        raise UserError(f"{name}: a {type(module).__name__}, not a linear layer of the plain "
                        "model; choose another")  # fmt: skip
    largest = largest_rank(module, bool(parts))
    if not isinstance(rank, Integral) or not 1 <= rank <= largest:
        raise UserError(f"{name}: rank {rank} must be a whole number between 1 and {largest}; "
                        "change the rank")  # fmt: skip


def largest_rank(linear: nn.Linear, in_slices: bool) -> int:
    """The smaller side of the matrix, or of a slice of it: a larger rank adds nothing."""
    rows = linear.out_features // (len(linear.parts) if in_slices else 1)
    return min(linear.in_features, rows)


def mark_only_lora_as_trainable(model: nn.Module) -> nn.Module:
    """Freezes everything but lora_A and lora_B; returns the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith(LORA)
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The A and B tensors by name."""
    return {name: t for name, t in model.state_dict().items() if name.endswith(LORA)}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with an update, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear) and m.is_lora()}


def eval_exactly(model: nn.Module) -> nn.Module:
    """eval(), except that a layer whose products are in 16 bits, as it is stored or under autocast,
    and that is not merged yet keeps its update beside the weight, without dropout, so that what
    answers is what was trained: rounding W + BA would lose most of a small BA (25 steps at 1e-5:
    83 % of it, half of their gain on held-out data)."""
    for module in model.modules():  # a layer before the dropout in it
        if isinstance(module, LoRALinear) and module.is_lora():
            is_narrow = autocast_dtype(module.weight).itemsize == 2
            module.train(is_narrow and not module.has_weights_merged)  # its mode is what merges
        else:
            module.training = False
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """eval_exactly for a while; then every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield eval_exactly(model)
    finally:
        for module, mode in modes:
            if isinstance(module, LoRALinear):
                module.train(mode)
            else:
                module.training = mode


@torch.no_grad()
def lost_in_merging(model: nn.Module) -> float:
    """What rounding the merged weights to their dtype takes away from the updates, as a share of
    the updates' norm: next to nothing in fp32; in 16 bits W + small keeps little of small."""
    lost = total = 0.0
    for layer in lora_layers(model).values():
        was_training = layer.training
        base, delta = layer.train().weight, layer.delta()
        kept = (base.to(delta.dtype) + delta).to(base.dtype).to(delta.dtype) - base
        lost += float((kept - delta).square().sum())
        total += float(delta.square().sum())
        layer.train(was_training)
    return (lost / total) ** 0.5 if total else 0.0


@torch.no_grad()
def fold_lora(model: nn.Module) -> int:
    """Adds every update to its weight for good, leaving plain linear layers; returns how many.

    The result has no adapter and can be saved as a model of its own. Errors: UserError for a
    layer that is switched off, or is not inside a larger model.
    """
    layers = lora_layers(model)
    n_layers = len(layers)
    for name, layer in layers.items():
        if not name or not layer.enabled:
            raise UserError(f"{name or 'this layer'}: switched off or alone; nothing to fold into")
    for name in [*layers]:
        layer = layers.pop(name).eval()  # and with it goes the original that it has set aside
        model.set_submodule(name, Linear.sharing(layer).train(model.training))
    return n_layers
