"""LLaMA-2 by hand, in Meta's parameter names, top to bottom.

Sources: Touvron et al. 2023 (LLaMA, Llama 2); RMSNorm: Zhang & Sennrich 2019; RoPE: Su et al. 2021;
SwiGLU: Shazeer 2020; grouped-query attention: Ainslie et al. 2023.

Legend of all shape comments: B batch, T new tokens, S cached + new columns, D width (dim),
H query heads, K key/value heads, Dh width of one head, V vocabulary, P soft-prompt positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama.names import hf_names
from minillm.attention import causal_attention, lay_out
from minillm.cache import KVCache
from minillm.config import check_sizes, find_preset
from minillm.cross_entropy import head_cross_entropy
from minillm.errors import UserError
from minillm.linear import Linear, linear
from minillm.norm import without_autocast
from minillm.rope import rope_table


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a LLaMA. `hidden_dim` is the width inside the feed-forward; `max_seq_len` in tokens.

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
    max_seq_len: int = 4096
    tied_head: bool = False  # the head shares the embedding's matrix

    def __post_init__(self):
        check_sizes(self)
        if self.dim % self.n_heads or self.head_dim % 2:
            raise UserError(
                f"LlamaConfig.dim {self.dim} over n_heads {self.n_heads} gives no even head width; "
                "RoPE rotates pairs, so dim must be a multiple of 2 * n_heads"
            )
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"LlamaConfig.n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head, Dh."""
        return self.dim // self.n_heads

    @classmethod
    def preset(cls, name: str) -> "LlamaConfig":
        """The published sizes by name. Errors: UserError listing the known names."""
        return find_preset(name, PRESETS)


PRESETS = {
    "llama-2-7b": LlamaConfig(4096, 32, 32, 32, 32000, 11008),
    "llama-2-13b": LlamaConfig(5120, 40, 40, 40, 32000, 13824),
    "llama-2-70b": LlamaConfig(8192, 80, 64, 8, 32000, 28672),
    "tiny-llama": LlamaConfig(192, 6, 6, 2, 2048, 512, max_seq_len=512, tied_head=True),
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in fp32 (or better). Keeps shape and dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates neighbours (x[2j], x[2j+1]) by the angle of their position: Meta's interleaved RoPE.
    A pair is a complex number here, and to rotate is to multiply by cos + i sin.

    Hugging Face rotates (x[j], x[j + Dh/2]) instead and stores the rows of wq and wk permuted to
    match; llama/checkpoint.py translates. Shapes: x (B, heads, T, Dh), kept; rope complex
    (1 or B, 1, T, Dh/2).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # (B, heads, T, Dh/2)
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)  # (B, heads, T, Dh)


class Attention(nn.Module):
    """The four projections of grouped-query attention; TransformerBlock.forward joins them."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = Linear(config.dim, config.dim, bias=False)
        self.wk = Linear(config.dim, kv_dim, bias=False)
        self.wv = Linear(config.dim, kv_dim, bias=False)
        self.wo = Linear(config.dim, config.dim, bias=False)

    def qkv(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> q (B, H, T, Dh), k and v (B, K, T, Dh), with q and k rotated."""
        q = self.wq(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, Dh)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, T, Dh)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, T, Dh)
        return apply_rope(q, rope), apply_rope(k, rope), v


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (B, T, D)


class TransformerBlock(nn.Module):
    """Two residual branches: attention over the visible columns, then the feed-forward."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        mask: Tensor | list[int] | None,
        mode: str,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        q, k, v = self.attention.qkv(self.attention_norm(x), rope)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, K, S, Dh): the past, then the new columns
        attended = causal_attention(q, k, v, mask, mode)  # (B, T, H * Dh)
        x = x + self.attention.wo(attended)  # (B, T, D)
        return x + self.feed_forward(self.ffn_norm(x))  # (B, T, D)


class Llama(nn.Module):
    """LLaMA-2: token embedding, n_layers blocks, final norm, vocabulary projection."""

    FAN_IN_FAN_OUT = False  # Hugging Face stores linear layers as (out, in), like ours
    BRANCH_ENDS = ("attention.wo", "feed_forward.w2")  # of every block: where adapters go
    HEAD = "output"  # where it is not tied
    product = staticmethod(linear)  # the tied head's x W^T; pack_weights swaps in a faster one

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention = "sdpa"  # or "explicit": scores, mask, softmax, values one by one
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied_head:
            self.output = Linear(config.dim, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, 0.02), the residual projections smaller by sqrt(2 n_layers) (GPT-2's rule)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.ones_(weight)
                continue
            is_residual = name.endswith(("wo.weight", "w2.weight"))
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
        x = self.tok_embeddings(tokens)  # (B, T, D)
        context = self.config.max_seq_len
        x, columns = lay_out(x, prompt, cache, left_pad, context, segments)  # (B, P + T, D)
        table = rope_table(columns.positions, self.config.head_dim, self.config.rope_theta)
        rope = torch.complex(*table)  # (1 or B, 1, P + T, Dh/2)
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
        x = self.norm(x)
        if targets is not None:
            return head_cross_entropy(x, self.vocabulary_head, targets)  # (N,)
        if self.config.tied_head:
            return self.product(x, self.tok_embeddings.weight)  # (..., V)
        return self.output(x)  # (..., V)

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding (V, D)."""
        return self.tok_embeddings

    @property
    def vocabulary_head(self) -> nn.Module:
        """The vocabulary projection: a layer of its own, or the token embedding."""
        return self.tok_embeddings if self.config.tied_head else self.output

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
        return KVCache.like(self.tok_embeddings.weight, sizes, dtype, device)

    def hf_names(self) -> dict[str, tuple[str, int]]:
        """{our module: (Hugging Face's name, heads whose rows RoPE permutes, 0 for none)}."""
        c = self.config
        return hf_names(c.n_layers, c.n_heads, c.n_kv_heads)
