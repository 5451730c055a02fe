"""The KV cache: keys and values of all layers, kept so that a new token costs one column."""

import torch
from torch import Tensor

from minillm.errors import UserError


class KVCache:
    """Keys and values of every layer for up to `max_len` columns, each written once (only beam
    search moves rows).

    The model reads `length` (columns filled so far), writes through `update` in every layer and
    calls `advance` once at the end, so layers never disagree about where they are.
    A cache belongs to one generation; make a new one for the next.

    Shapes: keys, values (n_layers, B, K, max_len, Dh). `n_prefix` counts the virtual columns
    (soft prompt or learned prefix) at the front, which are never padding.
    Units: `nbytes` in bytes.
    """

    def __init__(
        self,
        n_layers: int,
        batch_size: int,
        n_kv_heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (n_layers, batch_size, n_kv_heads, max_len, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.max_len = max_len
        self.length = 0
        self.n_prefix = 0
        self.n_kept = 0  # columns of a learned prefix, which reset leaves

    @classmethod
    def like(cls, weight: Tensor, sizes: tuple, dtype=None, device=None) -> "KVCache":
        """A cache of `sizes` (n_layers, B, K, max_len, Dh) for a model that has this weight: on its
        device, in the dtype its keys will be computed in, unless told otherwise."""
        device = torch.device(device or weight.device)
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        return cls(*sizes, dtype, device)

    @property
    def nbytes(self) -> int:
        """Bytes held, filled or not."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k, v (B, K, T, Dh) of one layer; returns all columns (B, K, S, Dh), as views
        where the cache is in their dtype. Errors: UserError if rows or columns do not fit."""
        end = self.length + k.size(2)
        if end > self.max_len or len(k) != self.keys.size(1):
            raise UserError(f"cache: made for {self.keys.size(1)} rows of {self.max_len} columns, "
                            f"{len(k)} of {end} are needed; make a larger one")  # fmt: skip
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end].to(k.dtype), self.values[layer, :, :, :end].to(v.dtype)

    def advance(self, n: int, n_virtual: int = 0) -> None:
        """Counts n new columns as written, n_virtual of them a soft prompt's; the model calls it
        once per forward."""
        self.length += n
        self.n_prefix += n_virtual

    def reorder(self, rows: Tensor) -> None:
        """Keeps the given rows (N,), repeats allowed, as the new batch (beam search)."""
        self.keys, self.values = (self._taken(x, rows) for x in (self.keys, self.values))

    def _taken(self, x: Tensor, rows: Tensor) -> Tensor:
        """x with the filled columns of the given rows, in place where there are as many."""
        shape = (x.size(0), len(rows), *x.shape[2:])
        out = x if len(rows) == x.size(1) else x.new_empty(shape)
        out[:, :, :, : self.length] = x[:, rows, :, : self.length]
        return out

    def reset(self) -> None:
        """Forgets everything but a learned prefix, keeping the memory."""
        self.length = self.n_prefix = self.n_kept
