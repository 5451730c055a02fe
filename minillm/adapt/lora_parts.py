"""LoRA on some slices of a fused layer, such as q and v of GPT-2's c_attn (Hu et al. 2021)."""

import torch
from torch import Tensor, nn

from minillm.adapt.lora_linear import LoRALinear


class LoRAParts(LoRALinear):
    """LoRA on some of the equal slices of a fused layer's rows, such as q and v of c_attn: each of
    the P slices has an A and a B of its own, the other rows no update.

    Shapes: lora_A (P * rank, in_features), lora_B (P * rows of a slice, rank), slice after slice.
    """

    @classmethod
    def from_fused(
        cls, linear: nn.Linear, parts: list[str], lora_rank: int, lora_alpha: float,
        lora_dropout: float = 0.0,
    ) -> "LoRAParts":  # fmt: skip
        """The same layer with LoRA on the named slices out of `linear.parts`."""
        layer = cls.sharing(linear)
        layer.adapted_parts = [part for part in layer.parts if part in parts]
        layer._add_factors(lora_rank, lora_alpha, lora_dropout)
        layer._reset_factors()
        return layer.train(linear.training)

    def _factor_shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        n, rows = len(self.adapted_parts), self.out_features // len(self.parts)
        return (n * rank, self.in_features), (n * rows, rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The slices as one update of rank P * rank: A (P * rank, in_features), and B
        (out_features, P * rank) with the slices' own in its blocks and zeros elsewhere."""
        n, rows = len(self.adapted_parts), self.out_features // len(self.parts)
        blocks = torch.block_diag(*self.lora_B.chunk(n)).chunk(n)  # each (rows, P * rank)
        by_part = dict(zip(self.adapted_parts, blocks, strict=True))
        none = self.lora_B.new_zeros(rows, len(self.lora_A))
        return self.lora_A, torch.cat([by_part.get(part, none) for part in self.parts])

    @torch.no_grad()
    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Takes the numbers of A and B, in the shapes of `factors`; of B only its blocks."""
        n = len(self.adapted_parts)
        by_part = dict(zip(self.parts, b.chunk(len(self.parts)), strict=True))
        own = [by_part[part].chunk(n, dim=1)[i] for i, part in enumerate(self.adapted_parts)]
        super().set_factors(a, torch.cat(own))  # each (rows, rank)
