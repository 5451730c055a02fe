"""Bottleneck adapters: after a linear layer, a small residual network of its own.

y = h + up(gelu(down(h))) with h = W x + b, where down has few rows and up begins at zero, so that
the adapted model starts as the model. Source: Houlsby et al. 2019, section 2.1: placed at the end
of both branches of every block, before the residual sum.
"""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from minillm.errors import UserError
from minillm.linear import Linear, is_plain, linear


class AdapterLinear(Linear):
    """nn.Linear, frozen, followed by a bottleneck of `width`, whose two layers are kept in fp32.

    Shapes: as nn.Linear; down (out_features -> width), up (width -> out_features).
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, width: int) -> "AdapterLinear":
        """The same layer with a bottleneck after it; weight and bias are shared, not copied."""
        layer = cls.sharing(linear)
        device = linear.weight.device
        layer.down = nn.Linear(linear.out_features, width, device=device)
        layer.up = nn.Linear(width, linear.out_features, device=device)
        nn.init.normal_(layer.down.weight, 0.0, 0.02)
        nn.init.zeros_(layer.down.bias)
        nn.init.zeros_(layer.up.weight)
        nn.init.zeros_(layer.up.bias)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)  # (..., out_features)
        down, up = self.down, self.up
        low = F.gelu(linear(h, down.weight.to(h.dtype), down.bias.to(h.dtype)))  # (..., width)
        return h + linear(low, up.weight.to(h.dtype), up.bias.to(h.dtype))


def add_adapters(model: nn.Module, targets: Iterable[str], width: int) -> int:
    """Puts a bottleneck after every linear layer whose name ends in a target; returns how many.

    Errors: UserError naming the layer for one that is not plain nn.Linear, or if none is there.
    """
    if width < 1:
        raise UserError(f"adapters of width {width}: must be at least 1; change --bottleneck")
    targets = tuple(targets)
    found = [name for name, _ in model.named_modules() if name.endswith(targets)]
    if not found:
        raise UserError(f"adapters: no layer is called {' or '.join(targets)} in this model")
    for name in found:
        layer = model.get_submodule(name)
        if not is_plain(layer):
            raise UserError(f"{name}: a {type(layer).__name__}; add adapters to the plain model")
        model.set_submodule(name, AdapterLinear.from_linear(layer, width))
    return len(found)
