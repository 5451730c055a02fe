"""Phi-1.5 by hand, in its official parameter names, top to bottom.

Sources: Li et al. 2023 (Phi-1.5); attention beside the feed-forward: Wang & Komatsuzaki 2021
(GPT-J); RoPE on a part of each head: Black et al. 2022 (GPT-NeoX); GELU: Hendrycks & Gimpel 2016.

Legend of all shape comments: B batch, T new tokens, S cached + new columns, D width (dim),
H query heads, K key/value heads, Dh width of one head, R its rotated part, V vocabulary,
P soft-prompt positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.attention import causal_attention, lay_out
from minillm.cache import KVCache
from minillm.config import check_sizes, find_preset
from minillm.cross_entropy import head_cross_entropy
from minillm.errors import UserError
from minillm.linear import Linear, linear
from minillm.norm import LayerNorm
from minillm.rope import rope_table


@dataclass(frozen=True)
class PhiConfig:
    """Sizes of a Phi. `hidden_dim` is the width inside the feed-forward, `rotary_share` the part of
    each head that RoPE turns, `max_seq_len` in tokens.

    Errors: UserError (a ValueError) for sizes that cannot be a model.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    hidden_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rotary_share: float = 0.5
    max_seq_len: int = 2048
    tied_head: bool = False  # the head shares the embedding's matrix

    def __post_init__(self):
        check_sizes(self)
        if self.dim % self.n_heads or self.rotary_dim % 2 or not self.rotary_dim >= 2:
            raise UserError(
                f"PhiConfig: {self.rotary_share:g} of a head of {self.dim} / {self.n_heads} is no "
                "even number of at least 2, and RoPE turns pairs; fix dim, n_heads or the share"
            )
        if self.rotary_share > 1 or self.n_heads % self.n_kv_heads:
            raise UserError(
                f"PhiConfig.n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}, and "
                f"rotary_share {self.rotary_share:g} be at most 1; fix them"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head, Dh."""
        return self.dim // self.n_heads

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a head RoPE turns, R."""
        return int(self.head_dim * self.rotary_share)

    @classmethod
    def preset(cls, name: str) -> "PhiConfig":
        """The published sizes by name. Errors: UserError listing the known names."""
        return find_preset(name, PRESETS)


PRESETS = {
    "phi-1.5": PhiConfig(2048, 24, 32, 32, 51200, 8192),
    "phi-2": PhiConfig(2560, 32, 32, 32, 51200, 10240, rotary_share=0.4),
    "tiny-phi": PhiConfig(128, 4, 4, 4, 2048, 512, max_seq_len=512),
}


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates (x[j], x[j + R/2]) of the first R numbers of each head by the angle of their position
    and leaves the others. Shapes: x (B, heads, T, Dh), kept."""
    cos, sin = rope  # (B, 1, T, R/2)
    half = cos.size(-1)
    wide = x[..., : 2 * half].to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.split(half, -1)  # each (B, heads, T, R/2)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((rotated.to(x.dtype), x[..., 2 * half :]), -1)  # (B, heads, T, Dh)


class Attention(nn.Module):
    """The four projections; Block.forward joins them."""

    def __init__(self, config: PhiConfig):
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.dim, config.dim)
        self.k_proj = Linear(config.dim, kv_dim)
        self.v_proj = Linear(config.dim, kv_dim)
        self.dense = Linear(config.dim, config.dim)

    def qkv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> q (B, H, T, Dh), k and v (B, K, T, Dh), with q and k rotated in part."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, T, Dh)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, T, Dh)
        return apply_rope(q, rope), apply_rope(k, rope), v


class MLP(nn.Module):
    """fc2(gelu(fc1 x)), GELU in its tanh form."""

    def __init__(self, config: PhiConfig):
        super().__init__()
        self.fc1 = Linear(config.dim, config.hidden_dim)
        self.fc2 = Linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # (B, T, D)


class Block(nn.Module):
    """One norm, then attention and feed-forward side by side, both added to the stream."""

    def __init__(self, config: PhiConfig):
        super().__init__()
        self.input_layernorm = LayerNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | list[int] | None,
        mode: str,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        normed = self.input_layernorm(x)  # (B, T, D)
        q, k, v = self.self_attn.qkv(normed, rope)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, K, S, Dh): the past, then the new columns
        attended = causal_attention(q, k, v, mask, mode)  # (B, T, H * Dh)
        return x + self.self_attn.dense(attended) + self.mlp(normed)  # (B, T, D)


class Phi(nn.Module):
    """Phi-1.5: token embedding, n_layers blocks, final norm, vocabulary projection with a bias."""

    FAN_IN_FAN_OUT = False  # Hugging Face stores linear layers as (out, in), like ours
    BRANCH_ENDS = ("self_attn.dense", "mlp.fc2")  # of every block: where adapters go
    HEAD = "lm_head"  # where it is not tied
    product = staticmethod(linear)  # the tied head's x W^T; pack_weights swaps in a faster one

    def __init__(self, config: PhiConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention = "sdpa"  # or "explicit": scores, mask, softmax, values one by one
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_layernorm = LayerNorm(config.dim, config.norm_eps)
        if not config.tied_head:
            self.lm_head = Linear(config.dim, config.vocab_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, 0.02), the residual projections smaller by sqrt(2 n_layers) (GPT-2's rule),
        biases zero."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.constant_(weight, 0.0 if name.endswith("bias") else 1.0)
                continue
            is_residual = name.endswith(("dense.weight", "fc2.weight"))
            shrink = (2 * self.config.n_layers) ** 0.5 if is_residual else 1.0
            nn.init.normal_(weight, 0.0, 0.02 / shrink)

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
        """Next-token logits; the same path trains, generates without a cache and with one.

        Shapes: tokens (B, T) int64; left_pad (B,) padding tokens at the start of each row; prompt
        (P, D) soft prompt put before the first token; logits_at (B, T) bool; segments the lengths
        of texts that stand side by side in T columns, each with positions and attention of its
        own. Returns (B, T, V), or (N, V) for the N positions of logits_at; with `targets` (N,), the
        tokens which those predict, their cross-entropies (N,) instead of logits. Advances the cache
        by P + T columns. Errors: UserError when the columns exceed max_seq_len.
        """
        x = self.embed_tokens(tokens)  # (B, T, D)
        context = self.config.max_seq_len
        x, columns = lay_out(x, prompt, cache, left_pad, context, segments)  # (B, P + T, D)
        rope = rope_table(columns.positions, self.config.rotary_dim, self.config.rope_theta)
        for layer, block in enumerate(self.layers):
            inputs = (x, rope, columns.mask, self.attention, cache, layer)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        if cache is not None:
            cache.advance(x.size(1), columns.n_prompt)
        x = x[:, columns.n_prompt :]  # (B, T, D)
        if logits_at is not None:
            x = x[logits_at]  # (N, D): the other positions never meet the vocabulary
        x = self.final_layernorm(x)
        if targets is not None:
            return head_cross_entropy(x, self.vocabulary_head, targets)  # (N,)
        if self.config.tied_head:
            return self.product(x, self.embed_tokens.weight)  # (..., V)
        return self.lm_head(x)  # (..., V)

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding (V, D)."""
        return self.embed_tokens

    @property
    def vocabulary_head(self) -> nn.Module:
        """The vocabulary projection: a layer of its own, or the token embedding."""
        return self.embed_tokens if self.config.tied_head else self.lm_head

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        return self.layers

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """An empty cache for `max_len` columns, in the dtype the keys will be computed in."""
        c = self.config
        sizes = (c.n_layers, batch_size, c.n_kv_heads, max_len, c.head_dim)
        return KVCache.like(self.embed_tokens.weight, sizes, dtype, device)

    def hf_names(self) -> dict[str, tuple[str, int]]:
        """{our module: (Hugging Face's name, 0)}: the same names under `model.`."""
        names = {name: (f"model.{name}", 0) for name, _ in self.named_modules() if name}
        return names | {self.HEAD: (self.HEAD, 0)}
