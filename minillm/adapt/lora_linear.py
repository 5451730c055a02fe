"""LoRA's layer: a frozen linear layer plus a trained product of two thin matrices.

y = W x + (alpha / rank) B A x, with A (rank, in) and B (out, rank), B zero at the start.
Source: Hu et al. 2021, section 4.1.
"""

import math
import weakref
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.dropout import Dropout
from minillm.errors import UserError
from minillm.linear import Linear

LORA = ("lora_A", "lora_B")  # what its tensors' names end in


class LoRALinear(Linear):
    """nn.Linear with a low-rank update that eval() merges into `weight` and train() takes out.

    Taking out puts the original parameter back, bit for bit: on merging it is set aside (on a GPU
    as a copy in host memory) and a merged one takes its place, so a merged layer holds its
    weight twice, and others who share the original never see a merged value. state_dict() always
    shows the original; moving, copying, loading into and changing A or B of a merged layer all
    leave it merged and right (on a GPU, a write through `.data` is seen at the next eval()). What
    is written into a merged weight itself would be lost with it: train() raises UserError then.
    `enabled = False` takes the update out in either mode. Rank 0 is a plain nn.Linear.

    Shapes: as nn.Linear; lora_A (rank, in_features), lora_B (out_features, rank), both at least
    fp32 and frozen until mark_only_lora_as_trainable. Dropout acts on the input of A.
    """

    product = staticmethod(F.linear)  # nn.Linear's own; from_linear takes over its layer's

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        lora_rank: int = 0,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.has_weights_merged = False
        if lora_rank > 0:
            self._add_factors(lora_rank, lora_alpha, lora_dropout)
        self.reset_parameters()  # the base once more: the course's checks expect these draws

    def _add_factors(self, rank: int, alpha: float, dropout: float) -> None:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        like = {"dtype": wide, "device": self.weight.device}
        a, b = self._factor_shapes(rank)
        self.lora_A = nn.Parameter(torch.empty(a, **like), False)
        self.lora_B = nn.Parameter(torch.empty(b, **like), False)
        self.lora_scaling = alpha / rank
        self.lora_dropout = Dropout(dropout)
        self._enabled = True
        # a list, so that nn.Module does not take the original for a parameter of its own
        self._set_aside: list[nn.Parameter] = []  # the original while a merged one stands in
        self._original = _Weakly()  # on a GPU, where a copy is set aside: while others hold it
        self._merged_from: tuple = ()  # the A and B that the merged one was made of
        self._merged = _Watched()  # the merged one, to see whether it was written to

    def _factor_shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (rank, self.in_features), (self.out_features, rank)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, lora_rank: int, lora_alpha: float, lora_dropout: float = 0.0
    ) -> "LoRALinear":
        """The same layer with LoRA added; weight and bias are shared, not copied."""
        layer = cls.sharing(linear)
        if lora_rank > 0:
            layer._add_factors(lora_rank, lora_alpha, lora_dropout)
            layer._reset_factors()
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """The base as nn.Linear draws it, then A (Kaiming uniform), B zero."""
        with self._unmerged():
            super().reset_parameters()
            if self.is_lora() and not self.weight.is_meta:
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
        if not self.training:
            self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self._is_stale():
            self._unmerge()
            self._merge()
        out = self.product(x, self.weight, self.bias)
        if self.has_weights_merged or not self.enabled:
            return out
        a, b = self.factors()
        low = self.product(self.lora_dropout(x), a.to(x.dtype))  # (..., rank)
        return out + self.product(self.lora_scaling * low, b.to(x.dtype))

    def train(self, mode: bool = True) -> "LoRALinear":
        """Takes the update out of the weight (True) or merges it in (False); eval() is
        train(False). Doing either twice is doing it once, with A and B as they then are."""
        super().train(mode)
        if self.is_lora():
            if mode or not self._enabled or self._is_stale(compare=True):
                self._unmerge()
            if not mode and self._enabled:
                self._merge()
        return self

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in_features) and B (out_features, rank), whose product the update is."""
        return self.lora_A, self.lora_B

    @torch.no_grad()
    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Takes the numbers of A and B, in the shapes of `factors`."""
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)

    def delta(self) -> Tensor:
        """The update as a matrix (out_features, in_features), in fp32 or better."""
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in self.factors())
        return self.lora_scaling * (b @ a)

    # inference_mode(False): a tensor born in inference mode could never meet autograd again
    @torch.inference_mode(False)
    @torch.no_grad()
    def _merge(self) -> None:
        if self.has_weights_merged:
            return
        base, a, b = self.weight, self.lora_A.detach().clone(), self.lora_B.detach().clone()
        # summed in fp32 and rounded once: in bf16, W + small loses most of small
        kind = "cuda" if base.is_cuda else "cpu"
        with torch.autocast(kind, enabled=False):
            delta = self.delta()
            merged = (base.to(delta.dtype) + delta).to(base.dtype)
        # may fail: before anything changes
        kept = nn.Parameter(_to_host(base.data), base.requires_grad) if base.is_cuda else base
        self._set_aside.append(kept)
        self._original = _Weakly(base if base.is_cuda else None)
        self.weight = nn.Parameter(merged, base.requires_grad)
        # torch.compile makes the parameter anew when its code has run: nothing to watch then
        self._merged = _Watched(None if torch.compiler.is_compiling() else self.weight)
        self._merged_from = (a, b, self._versions())
        self.has_weights_merged = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def _unmerge(self) -> None:
        if not self.has_weights_merged:
            return
        if self._set_aside:
            self._check_unwritten()
            base = self._original.get()
            if base is None:  # nobody else held it, or on a CPU: it is what was set aside
                base = self._set_aside[0]
            device = self.weight.device
            if base.device != device:  # a full GPU may refuse it: till then it stays set aside
                base = nn.Parameter(base.data.to(device, non_blocking=True))
            if base.requires_grad != self.weight.requires_grad:  # as it is meanwhile
                base.requires_grad_(self.weight.requires_grad)
            self.weight = base
            self._set_aside.clear()
            self._merged = _Watched()
        else:  # the flag was set by hand: no original is at hand
            self.weight.data -= self.delta().to(self.weight.dtype)
        self._merged_from = ()
        self.has_weights_merged = False

    def _check_unwritten(self) -> None:
        """Errors: UserError if the merged weight was trained or replaced, unless by `.data`: the
        original would come back without that."""
        if not self._merged.is_still(self.weight):
            raise UserError("LoRALinear: the weight was trained or replaced while LoRA is merged "
                            "into it, and would be lost; call train() first")  # fmt: skip

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
        """Changes when A, B or the original is replaced or written to, except through `.data` or
        fused steps."""
        return self.lora_scaling, *(
            (id(t), t.data_ptr(), 0 if t.is_inference() else t._version)
            for t in (self.lora_A, self.lora_B, *self._set_aside)
        )

    def _is_stale(self, compare: bool = False) -> bool:
        """Whether what was merged has changed since. On a GPU the values of A and B are compared
        only if asked: that would stop its queue, in every layer."""
        if not self.is_lora() or not self._set_aside:
            return False
        a, b, versions = self._merged_from
        if versions != self._versions():
            return True
        if a.is_cuda and not compare:
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


class _Weakly:
    """A parameter for as long as somebody else holds it; copied or saved, it is none's."""

    def __init__(self, parameter: nn.Parameter | None = None):
        self.get = (lambda: None) if parameter is None else weakref.ref(parameter)

    def __reduce__(self):
        return _Weakly, ()


class _Watched:
    """A parameter as it was; of a copy of this, or a saved one, none."""

    def __init__(self, parameter: nn.Parameter | None = None):
        self.parameter = parameter
        self.version = 0 if parameter is None else parameter._version

    def is_still(self, parameter: nn.Parameter) -> bool:
        """Whether it is this one, not written to since, as far as known."""
        known = self.parameter is not None
        return not known or (self.parameter is parameter and parameter._version == self.version)

    def __reduce__(self):
        return _Watched, ()


def _to_host(x: Tensor) -> Tensor:
    """A copy in host memory that the GPU reads and writes by itself (pinned), which PyTorch keeps
    for the next one: plain memory is ten times slower to come by and to fill."""
    try:
        host = torch.empty_like(x, device="cpu", pin_memory=True)
    except RuntimeError:  # the system grants no such memory
        return x.cpu()
    return host.copy_(x)
