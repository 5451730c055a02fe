"""Soft prompts and prefixes in PEFT's layout, both ways: one tensor, `prompt_embeddings`.

PEFT keeps a prefix as (P, 2 L K Dh), layer after layer, keys before values, keys after rotation.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from minillm.adapt.prompts import PrefixTuning, SoftPrompt, check_virtual
from minillm.errors import UserError
from minillm.weights import LazyTensor

KEY = "prompt_embeddings"
PROMPT, PREFIX = "PROMPT_TUNING", "PREFIX_TUNING"


def prompt_files(adapted: SoftPrompt | PrefixTuning) -> tuple[dict[str, Tensor], dict]:
    """What PEFT's two files hold of it."""
    c = adapted.config
    settings = {
        "num_virtual_tokens": adapted.n_virtual, "num_transformer_submodules": 1,
        "num_layers": c.n_layers, "num_attention_heads": c.n_heads, "token_dim": c.dim,
    }  # fmt: skip
    if isinstance(adapted, SoftPrompt):
        return {KEY: adapted.table}, {"peft_type": PROMPT, **settings}
    n_kv_heads = adapted.shape[3]
    settings |= {"num_attention_heads": n_kv_heads, "token_dim": n_kv_heads * c.head_dim}
    columns = adapted.keys_and_values().detach().clone()  # (P, L, 2, K, Dh)
    if _rotates(adapted.model):
        columns[:, :, 0] = columns[:, :, 0].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    settings |= {"peft_type": PREFIX, "prefix_projection": False}
    return {KEY: columns.flatten(1)}, settings


def load_prompt(
    model: nn.Module, kind: str, file: Path, tensors: dict[str, LazyTensor]
) -> nn.Module:
    """The model wrapped in the soft prompt or prefix (`kind`) of PEFT's files.

    Errors: UserError for a tensor that is missing or of another model's shape.
    """
    check_virtual(model, 1)
    lazy, c = tensors.get(KEY), model.config
    if kind == PROMPT:
        sizes = (c.dim,)
    else:
        n_kv_heads = getattr(c, "n_kv_heads", c.n_heads)
        sizes = (c.n_layers, 2, n_kv_heads, c.head_dim)
    width = torch.Size(sizes).numel()
    if lazy is None or len(lazy.shape) != 2 or lazy.shape[1] != width:
        found = "missing" if lazy is None else f"of shape {tuple(lazy.shape)}"
        raise UserError(f"{file}: {KEY} is {found}, (P, {width}) was expected; a wrong base?")
    value = torch.empty(lazy.shape, device=model.embedding.weight.device)
    lazy.write_to(value)
    if kind == PROMPT:
        return SoftPrompt(model, value).train(model.training)
    columns = value.view(-1, *sizes)
    if _rotates(model):
        columns[:, :, 0] = columns[:, :, 0].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return PrefixTuning(model, columns).train(model.training)


def _rotates(model: nn.Module) -> bool:
    """Whether keys carry RoPE, whose pairs Hugging Face keeps half a head apart."""
    return any(heads for _, heads in model.hf_names().values())
