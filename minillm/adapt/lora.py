"""LoRA: a frozen linear layer plus a trained product of two thin matrices.

y = W x + (alpha / rank) B A x, with A (rank, in) and B (out, rank), B zero at the start.
Source: Hu et al. 2021, section 4.1.
"""

import math
from collections.abc import Iterable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.errors import UserError


class LoRALinear(nn.Linear):
    """nn.Linear with a low-rank update that eval() merges into `weight` and train() takes out.

    Taking out puts the original parameter back, bit for bit: on merging it is set aside (in host
    memory when it lives on a GPU) and a merged one takes its place, so a merged layer holds its
    weight twice, and others who share the original never see a merged value. state_dict() always
    shows the original; moving, copying, loading into and changing A or B of a merged layer all
    leave it merged and right (on a GPU, a write through `.data` is seen at the next eval()).
    `enabled = False` takes the update out in either mode. Rank 0 is a plain nn.Linear.

    Shapes: as nn.Linear; lora_A (rank, in_features), lora_B (out_features, rank), both at least
    fp32 and frozen until mark_only_lora_as_trainable. Dropout acts on the input of A.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lora_rank: int = 0,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.has_weights_merged = False
        if lora_rank > 0:
            self._add_factors(lora_rank, lora_alpha, lora_dropout)
        self.reset_parameters()

    def _add_factors(self, rank: int, alpha: float, dropout: float) -> None:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        like = {"dtype": wide, "device": self.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like), False)
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **like), False)
        self.lora_scaling = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        self._enabled = True
        # a list, so that nn.Module does not take the original for a parameter of its own
        self._set_aside: list[nn.Parameter] = []  # the original while a merged one stands in
        self._merged_from: tuple = ()  # the A and B that the merged one was made of

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, lora_rank: int, lora_alpha: float, lora_dropout: float = 0.0
    ) -> "LoRALinear":
        """The same layer with LoRA added; weight and bias are shared, not copied."""
        size = (linear.in_features, linear.out_features, linear.bias is not None)
        layer = cls(*size, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        if lora_rank > 0:
            layer._add_factors(lora_rank, lora_alpha, lora_dropout)
            layer._reset_factors()
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """The base as nn.Linear draws it, then A (Kaiming uniform), B zero."""
        with self._unmerged():
            super().reset_parameters()
            if self.is_lora():
                self._reset_factors()

    def _reset_factors(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def is_lora(self) -> bool:
        """Whether the layer has an update at all (rank > 0)."""
        return hasattr(self, "lora_A")

    @property
    def enabled(self) -> bool:
        """Whether the update counts; False shows the base alone (a reference model, for DPO)."""
        return self.is_lora() and self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if not self.is_lora():
            raise AttributeError("a layer of rank 0 has no update to switch")
        self._enabled = value
        self.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if self._is_stale():
            self._unmerge()
            self._merge()
        out = F.linear(x, self.weight, self.bias)
        if self.has_weights_merged or not self.enabled:
            return out
        low = F.linear(self.lora_dropout(x), self.lora_A.to(x.dtype))  # (..., rank)
        return out + self.lora_scaling * F.linear(low, self.lora_B.to(x.dtype))

    def train(self, mode: bool = True) -> "LoRALinear":
        """Takes the update out of the weight (True) or merges it in (False); eval() is
        train(False). Doing either twice is doing it once, with A and B as they then are."""
        super().train(mode)
        if self.is_lora():
            if mode or not self._enabled or self._set_aside:
                self._unmerge()
            if not mode and self._enabled:
                self._merge()
        return self

    def delta(self) -> Tensor:
        """The update as a matrix (out_features, in_features)."""
        return self.lora_scaling * (self.lora_B @ self.lora_A)

    # inference_mode(False): a tensor born in inference mode could never meet autograd again
    @torch.inference_mode(False)
    @torch.no_grad()
    def _merge(self) -> None:
        if self.has_weights_merged:
            return
        base, a, b = self.weight, self.lora_A.detach().clone(), self.lora_B.detach().clone()
        # summed in fp32 and rounded once: in bf16, W + small loses most of small
        merged = (base.to(a.dtype) + self.lora_scaling * (b @ a)).to(base.dtype)
        self._set_aside.append(base)
        self.weight = nn.Parameter(merged, base.requires_grad)
        if base.is_cuda:
            base.data = base.data.cpu()
        self._merged_from = (a, b, self._versions())
        self.has_weights_merged = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def _unmerge(self) -> None:
        if not self.has_weights_merged:
            return
        if self._set_aside:
            base = self._set_aside.pop()
            base.data = base.data.to(self.weight.device)
            self.weight = base
        else:  # the flag was set by hand: no original is at hand
            self.weight.data -= self.delta().to(self.weight.dtype)
        self._merged_from = ()
        self.has_weights_merged = False

    @contextmanager
    def _unmerged(self):
        """The original in place while something reads or writes it; merged again after."""
        merged = self.is_lora() and bool(self._set_aside)
        if merged:
            self._unmerge()
        try:
            yield
        finally:
            if merged:
                self._merge()

    def _versions(self) -> tuple:
        """Changes when A or B is replaced or written to, except through `.data` or fused steps."""
        return self.lora_scaling, *(
            (id(t), t.data_ptr(), 0 if t.is_inference() else t._version)
            for t in (self.lora_A, self.lora_B)
        )

    def _is_stale(self) -> bool:
        if not self.is_lora() or not self._set_aside:
            return False
        a, b, versions = self._merged_from
        if versions != self._versions():
            return True
        if a.is_cuda:  # comparing values would stop the GPU's queue in every layer
            return False
        return not (torch.equal(a, self.lora_A) and torch.equal(b, self.lora_B))

    def _apply(self, fn, recurse=True):  # .to(), .cuda(), .half()
        with self._unmerged():
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_lora() and self._set_aside:
            base = self._set_aside[0]
            destination[prefix + "weight"] = base if keep_vars else base.detach()

    def _load_from_state_dict(self, *args):
        with self._unmerged():
            super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        """nn.Linear's, with rank and scaling."""
        if not self.is_lora():
            return super().extra_repr()
        rank, scaling = len(self.lora_A), self.lora_scaling
        return f"{super().extra_repr()}, lora_rank={rank}, lora_scaling={scaling:g}"


def add_lora(
    model: nn.Module,
    targets: Iterable[str] = ("wq", "wv"),
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.05,
) -> int:
    """Replaces every linear layer whose name ends in a target; returns how many.

    "wq" means every module so called, "layers.0.attention.wq" that one. Call
    mark_only_lora_as_trainable next. Errors: UserError naming the module, and nothing is changed,
    for a target that matches nothing, is no nn.Linear or has LoRA already, for a rank below 1 or
    above the smaller side of the matrix.
    """
    found, targets = {}, list(targets)
    if not targets:
        raise UserError("LoRA targets: none given; name at least one layer, such as wq")
    modules = dict(model.named_modules())
    for target in targets:
        names = [n for n in modules if n == target or n.endswith("." + target)]
        if not names:
            linear = {n.split(".")[-1] for n, m in modules.items() if isinstance(m, nn.Linear)}
            raise UserError(
                f"LoRA target {target!r} matches no layer; there are {', '.join(sorted(linear))}"
            )
        found |= dict.fromkeys(names)
    for name in found:
        _check_target(name, modules[name], rank)
    for name in found:
        owner, _, leaf = name.rpartition(".")
        layer = LoRALinear.from_linear(modules[name], rank, alpha, dropout)
        setattr(model.get_submodule(owner), leaf, layer)
    return len(found)


def _check_target(name: str, module: nn.Module, rank: int) -> None:
    if isinstance(module, LoRALinear) and module.is_lora():
        raise UserError(f"{name}: has LoRA already; add it once, to the plain model")
    if not isinstance(module, nn.Linear):
        raise UserError(f"{name}: a {type(module).__name__}, not a linear layer; choose another")
    smaller = min(module.in_features, module.out_features)
    if not 1 <= rank <= smaller:
        raise UserError(f"{name}: rank {rank} must lie between 1 and {smaller}; change the rank")


def mark_only_lora_as_trainable(model: nn.Module) -> nn.Module:
    """Freezes everything but lora_A and lora_B; returns the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.rpartition(".")[2] in ("lora_A", "lora_B")
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The A and B tensors by name."""
    state = model.state_dict()
    return {n: t for n, t in state.items() if n.rpartition(".")[2] in ("lora_A", "lora_B")}


@torch.no_grad()
def fold_lora(model: nn.Module) -> int:
    """Adds every update to its weight for good, leaving plain nn.Linear layers; returns how many.

    The result has no adapter and can be saved as a model of its own. Errors: UserError for a
    layer that is switched off, or is not inside a larger model.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear) and m.is_lora()}
    for name, layer in layers.items():
        if not name or not layer.enabled:
            raise UserError(f"{name or 'this layer'}: switched off or alone; nothing to fold into")
    for name, layer in layers.items():
        layer.eval()
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, linear.train(model.training))
    return len(layers)
