"""GPT-2 by hand, in OpenAI's parameter names, top to bottom.

Sources: Radford et al. 2019 (GPT-2); GELU: Hendrycks & Gimpel 2016; LayerNorm: Ba et al. 2016.

Legend of all shape comments: B batch, T new tokens, S cached + new columns, D width (dim),
H heads, Dh width of one head, V vocabulary, P soft-prompt positions.
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


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of a GPT-2; `max_seq_len` in tokens. The feed-forward is four times as wide as `dim`.

    Errors: UserError (a ValueError) for sizes that cannot be a model.
    """

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int = 50257
    max_seq_len: int = 1024
    norm_eps: float = 1e-5
    tied_head: bool = True  # the head shares the token embedding's matrix

    def __post_init__(self):
        check_sizes(self)
        if self.dim % self.n_heads:
            raise UserError(f"GPT2Config.dim {self.dim} is no multiple of n_heads {self.n_heads}")

    @property
    def head_dim(self) -> int:
        """Width of one head, Dh."""
        return self.dim // self.n_heads

    @classmethod
    def preset(cls, name: str) -> "GPT2Config":
        """The published sizes by name. Errors: UserError listing the known names."""
        return find_preset(name, PRESETS)


PRESETS = {
    "gpt2": GPT2Config(768, 12, 12),
    "gpt2-medium": GPT2Config(1024, 24, 16),
    "gpt2-large": GPT2Config(1280, 36, 20),
    "gpt2-xl": GPT2Config(1600, 48, 25),
    "tiny-gpt2": GPT2Config(224, 5, 7, vocab_size=2048, max_seq_len=512),
}


class Attention(nn.Module):
    """The fused projection to q, k and v, and the one back; Block.forward joins them."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_heads = config.n_heads
        self.c_attn = Linear(config.dim, 3 * config.dim)
        self.c_attn.parts = ("q", "k", "v")  # equal slices of its rows; LoRA can take them apart
        self.c_proj = Linear(config.dim, config.dim)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> q, k, v, each (B, H, T, Dh)."""
        fused = self.c_attn(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, Dh)
        return fused.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, H, T, Dh)


class MLP(nn.Module):
    """c_proj(gelu(c_fc x)), GELU in its tanh form."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = Linear(config.dim, 4 * config.dim)
        self.c_proj = Linear(4 * config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # (B, T, D)


class Block(nn.Module):
    """Two residual branches, each normalised at its entrance: attention, then the feed-forward."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = LayerNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | list[int] | None,
        mode: str,
        cache: KVCache | None,
        layer: int,
        dropout: float,
    ) -> Tensor:
        q, k, v = self.attn.qkv(self.ln_1(x))
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, H, S, Dh): the past, then the new columns
        attended = causal_attention(q, k, v, mask, mode, dropout)  # (B, T, H * Dh)
        x = x + F.dropout(self.attn.c_proj(attended), dropout)  # (B, T, D)
        return x + F.dropout(self.mlp(self.ln_2(x)), dropout)  # (B, T, D)


class GPT2(nn.Module):
    """GPT-2: token and position embeddings, n_layers blocks, final norm, and the token embedding
    once more as the vocabulary projection (a tied head)."""

    FAN_IN_FAN_OUT = True  # Hugging Face stores these layers transposed (Conv1D)
    BRANCH_ENDS = ("attn.c_proj", "mlp.c_proj")  # of every block: where adapters go
    HEAD = "lm_head"  # where it is not tied
    product = staticmethod(linear)  # the tied head's x W^T; pack_weights swaps in a faster one

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention = "sdpa"  # or "explicit": scores, mask, softmax, values one by one
        self.dropout = 0.0  # in training: of embeddings, attention weights and both branches
        self.wte = nn.Embedding(config.vocab_size, config.dim)
        self.wpe = nn.Embedding(config.max_seq_len, config.dim)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = LayerNorm(config.dim, config.norm_eps)
        if not config.tied_head:
            self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """OpenAI's: Normal(0, 0.02), positions 0.01, the residual projections smaller by
        sqrt(2 n_layers), biases zero."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.constant_(weight, 0.0 if name.endswith("bias") else 1.0)
                continue
            is_residual = name.endswith("c_proj.weight")
            shrink = (2 * self.config.n_layers) ** 0.5 if is_residual else 1.0
            nn.init.normal_(weight, 0.0, 0.01 if name == "wpe.weight" else 0.02 / shrink)

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
        x = self.wte(tokens)  # (B, T, D)
        context = self.config.max_seq_len
        x, columns = lay_out(x, prompt, cache, left_pad, context, segments)  # (B, P + T, D)
        dropout = self.dropout if self.training else 0.0
        x = F.dropout(x + self.wpe(columns.positions), dropout)
        for layer, block in enumerate(self.h):
            inputs = (x, columns.mask, self.attention, cache, layer, dropout)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        if cache is not None:
            cache.advance(x.size(1), columns.n_prompt)
        x = x[:, columns.n_prompt :]  # (B, T, D)
        if logits_at is not None:
            x = x[logits_at]  # (N, D): the other positions never meet the vocabulary
        x = self.ln_f(x)
        if targets is not None:
            return head_cross_entropy(x, self.vocabulary_head, targets)  # (N,)
        if self.config.tied_head:
            return self.product(x, self.wte.weight)  # (..., V)
        return self.lm_head(x)  # (..., V)

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding (V, D)."""
        return self.wte

    @property
    def vocabulary_head(self) -> nn.Module:
        """The vocabulary projection: a layer of its own, or the token embedding."""
        return self.wte if self.config.tied_head else self.lm_head

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        return self.h

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """An empty cache for `max_len` columns, in the dtype the keys will be computed in."""
        c = self.config
        sizes = (c.n_layers, batch_size, c.n_heads, max_len, c.head_dim)
        return KVCache.like(self.wte.weight, sizes, dtype, device)

    def hf_names(self) -> dict[str, tuple[str, int]]:
        """{our module: (Hugging Face's name, 0)}: the same names under `transformer.`."""
        names = {name: (f"transformer.{name}", 0) for name, _ in self.named_modules() if name}
        return names | {self.HEAD: (self.HEAD, 0)}
