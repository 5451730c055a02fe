"""llama2.c's weights: small real models in a .bin. Their tokenizers: pieces.py."""

import math
import struct
from functools import partial
from pathlib import Path

import numpy as np
import torch

from llama.model import LlamaConfig
from minillm.errors import UserError
from minillm.files import check_readable
from minillm.weights import LazyTensor


def open_llama2c(path: Path) -> tuple[LlamaConfig, dict[str, LazyTensor]]:
    """llama2.c's legacy .bin: seven int32, then fp32 matrices kind by kind, in Meta's layout."""
    check_readable(path)
    with path.open("rb") as file:
        head = file.read(28)
    if len(head) < 28 or head[:4] == b"24ka":
        raise UserError(f"{path}: no legacy llama2.c export (version 0); export it again as one")
    dim, hidden, n_layers, n_heads, n_kv_heads, vocab, seq_len = struct.unpack("<7i", head)
    try:
        config = LlamaConfig(
            dim, n_layers, n_heads, n_kv_heads, abs(vocab), hidden,
            max_seq_len=seq_len, tied_head=vocab > 0,
        )  # fmt: skip
    except UserError:
        raise UserError(f"{path}: its first numbers are no LLaMA's sizes; check the file") from None
    kv = n_kv_heads * config.head_dim
    layout = [
        ("attention_norm", (dim,)), ("attention.wq", (dim, dim)), ("attention.wk", (kv, dim)),
        ("attention.wv", (kv, dim)), ("attention.wo", (dim, dim)), ("ffn_norm", (dim,)),
        ("feed_forward.w1", (hidden, dim)), ("feed_forward.w2", (dim, hidden)),
        ("feed_forward.w3", (hidden, dim)),
    ]  # fmt: skip
    order = [("tok_embeddings", (config.vocab_size, dim))]
    order += [(f"layers.{i}.{name}", shape) for name, shape in layout for i in range(n_layers)]
    order += [("norm", (dim,)), (None, (2, seq_len, config.head_dim // 2))]  # None: RoPE's tables
    if not config.tied_head:
        order.append(("output", (config.vocab_size, dim)))
    tensors, at = {}, 28
    for name, shape in order:
        if name is not None:
            load = partial(np.memmap, path, "<f4", "c", at, math.prod(shape))
            tensors[f"{name}.weight"] = LazyTensor.read_by(
                lambda load=load: torch.from_numpy(load()), shape, path
            )
        at += 4 * math.prod(shape)
    if path.stat().st_size != at:
        raise UserError(f"{path}: {path.stat().st_size} bytes, its header asks for {at}; fetch it")
    return config, tensors
