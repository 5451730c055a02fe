"""Prompt tuning and prefix tuning: a frozen model with P trained columns before every text.

Both wrap the model they adapt and answer its call, so the loop, the generator and the metrics need
not know. Text then stands at positions P, P + 1, ... and the context is P tokens shorter.
Sources: Lester et al. 2021 (prompt tuning), Li & Liang 2021 (prefix tuning).

Legend of shape comments: as in the models; L layers, K key heads, P virtual columns.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from minillm.adapt.lora import evaluating
from minillm.cache import KVCache
from minillm.errors import UserError


class Wrapped(nn.Module):
    """What the two have in common: the model within, its switches, and a shorter context."""

    def __init__(self, model: nn.Module, n_virtual: int):
        super().__init__()
        check_virtual(model, n_virtual)
        self.model = model
        self.n_virtual = n_virtual
        self.config = replace(model.config, max_seq_len=model.config.max_seq_len - n_virtual)

    @property
    def attention(self) -> str:
        """The model's own: "sdpa" or "explicit"."""
        return self.model.attention

    @attention.setter
    def attention(self, mode: str) -> None:
        self.model.attention = mode

    @property
    def vocabulary_head(self) -> nn.Module:
        """The model's own vocabulary projection."""
        return self.model.vocabulary_head

    @property
    def gradient_checkpointing(self) -> bool:
        """The model's own: whether each block is recomputed in backward."""
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.model.gradient_checkpointing = on


def check_virtual(model: nn.Module, n: int) -> None:
    """Errors: UserError unless n virtual columns leave room for a text of two tokens, or if the
    model has such columns already."""
    if isinstance(model, Wrapped):
        raise UserError("the model has a soft prompt or a prefix already; wrap the plain one")
    context = model.config.max_seq_len
    if not 1 <= n <= context - 2:
        raise UserError(f"{n} virtual tokens: must be from 1 to {context - 2}, as the context is "
                        f"{context}; take fewer (--virtual-tokens)")  # fmt: skip


class SoftPrompt(Wrapped):
    """Prompt tuning: P trained rows, shaped like token embeddings, before those of every text.

    Shapes: table (P, D), kept in fp32; the call is the model's own. A soft prompt given to the
    call comes after the trained one.
    """

    def __init__(self, model: nn.Module, table: Tensor):
        super().__init__(model, len(table))
        self.table = nn.Parameter(table.detach().float().clone())

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        left_pad: Tensor | None = None,
        prompt: Tensor | None = None,
        logits_at: Tensor | None = None,
        segments: list[int] | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """The model's answer to `tokens` after the trained rows; see the model's own forward."""
        if cache is None or cache.length == 0:
            table = self.table
            prompt = table if prompt is None else torch.cat((table, prompt.to(table.dtype)))
        return self.model(tokens, cache, left_pad, prompt, logits_at, segments, targets)

    def new_cache(self, batch_size: int, max_len: int, dtype=None, device=None) -> KVCache:
        """The model's cache, with room for the trained rows as well."""
        return self.model.new_cache(batch_size, self.n_virtual + max_len, dtype, device)


class PrefixTuning(Wrapped):
    """Prefix tuning: trained keys and values of P columns in every layer, as if of a text before.

    Re-parametrised (`hidden` > 0), they are `start` + W2 tanh(W1 e), with e (P, D) trained as well
    and W2 zero at first; the paper trains better so at high learning rates. What is saved are the
    keys and values alone.

    Shapes: start (P, L, 2, K, Dh), keys and values where training begins; the call is the model's.
    """

    def __init__(self, model: nn.Module, start: Tensor, hidden: int = 0):
        super().__init__(model, len(start))
        start = start.detach().float().clone()
        self.shape = start.shape
        if hidden == 0:
            self.columns = nn.Parameter(start)
            return
        like = {"device": start.device}
        self.register_buffer("start", start)
        self.seed = nn.Parameter(torch.randn(len(start), model.config.dim, **like))
        self.inner = nn.Linear(model.config.dim, hidden, **like)
        self.outer = nn.Linear(hidden, start[0].numel(), **like)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def keys_and_values(self) -> Tensor:
        """The prefix as it is now, (P, L, 2, K, Dh) fp32."""
        if hasattr(self, "columns"):
            return self.columns
        return self.start + self.outer(torch.tanh(self.inner(self.seed))).view(self.shape)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        left_pad: Tensor | None = None,
        prompt: Tensor | None = None,
        logits_at: Tensor | None = None,
        segments: list[int] | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """The model's answer to `tokens` after the prefix; see the model's own forward."""
        if cache is None:
            cache = PrefixCache(self.keys_and_values())
        return self.model(tokens, cache, left_pad, prompt, logits_at, segments, targets)

    @torch.no_grad()
    def new_cache(self, batch_size: int, max_len: int, dtype=None, device=None) -> KVCache:
        """The model's cache with the prefix in its first columns."""
        cache = self.model.new_cache(batch_size, self.n_virtual + max_len, dtype, device)
        past = PrefixCache(self.keys_and_values())
        cache.keys[:, :, :, : past.length] = past.keys[:, None]
        cache.values[:, :, :, : past.length] = past.values[:, None]
        cache.advance(past.length, past.length)
        cache.n_kept = past.length
        return cache


class PrefixCache:
    """A trained prefix as the past of one forward: read, never written, so gradients reach it.

    Shapes: columns (P, L, 2, K, Dh) -> keys, values (L, K, P, Dh).
    """

    def __init__(self, columns: Tensor):
        self.keys, self.values = columns.permute(1, 2, 3, 0, 4).unbind(1)
        self.length = self.n_prefix = len(columns)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix before k, v (B, K, T, Dh) of one layer: (B, K, P + T, Dh) each."""
        rows = k.size(0)
        past_k = self.keys[layer].to(k.dtype).expand(rows, -1, -1, -1)
        past_v = self.values[layer].to(v.dtype).expand(rows, -1, -1, -1)
        return torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)

    def advance(self, n: int, n_virtual: int = 0) -> None:
        """Nothing: the next forward begins with the same past."""


@torch.no_grad()
def prefix_of_text(model: nn.Module, ids: list[int]) -> Tensor:
    """Keys and values that the model itself computes for a text, (P, L, 2, K, Dh) fp32: a prefix
    that is, to the bit of rounding, those tokens before every text."""
    device = next(model.parameters()).device
    cache = model.new_cache(1, len(ids))
    with evaluating(model):
        model(torch.tensor([ids], device=device), cache)
    both = torch.stack((cache.keys[:, 0], cache.values[:, 0]), 1)  # (L, 2, K, P, Dh)
    return both.permute(3, 0, 1, 2, 4).float().contiguous()
