"""GPT-2 weights in and out: Hugging Face folders.

The trap: Hugging Face stores the four linear layers of a block as (in, out), like OpenAI did, and
one of them is square, so that no shape tells: they are transposed by name.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gpt2.model import GPT2, GPT2Config
from gpt2.tokenizer import GPT2Tokenizer
from minillm.bpe_tokenizer import find_vocabulary
from minillm.checkpoint import (
    check_saveable,
    check_tokenizer,
    empty_model,
    is_copy,
    keep_first_layers,
    write_hf,
)
from minillm.config import with_layers
from minillm.errors import UserError
from minillm.files import Fields
from minillm.hub import Official
from minillm.weights import LazyTensor, add_once, assign_weights, open_hf_weights

_FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")
_VOCAB = {
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_SMALL = {"model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"}
OFFICIAL = {
    name: Official(f"openai-community/{name}", _FILES, _VOCAB | (_SMALL if name == "gpt2" else {}))
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}

TRANSPOSED = re.compile(r".*\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
HEAD = "lm_head.weight"
SKIPPED = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # masks that old versions stored
BARE = re.compile(r"(wte|wpe|h\.\d+|ln_f)\.")


def load_gpt2(
    path: str | Path,
    n_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: str | Path | None = None,
) -> tuple[GPT2, GPT2Tokenizer]:
    """A model and its tokenizer from a Hugging Face folder, with or without `transformer.` names.

    `n_layers` keeps the first blocks and reads no other; `tokenizer` names a folder or file where
    the model has none beside it (without one, text is taken as bytes, with a warning). Tensors
    stream one by one into `dtype` on `device`: host memory stays within the model itself. Errors:
    UserError naming the file, what is wrong with it and every missing, unexpected or misshapen
    tensor.
    """
    path = Path(path)
    whole, tensors = open_hf(path)
    config = with_layers(whole, n_layers, path)
    tensors = keep_first_layers(tensors, "h", whole.n_layers, config.n_layers)
    text = GPT2Tokenizer(tokenizer or find_vocabulary(path))
    check_tokenizer(text, config.vocab_size, path)
    model = empty_model(lambda: GPT2(config))
    assign_weights(model, tensors, path, dtype, device)
    return model, text


def open_hf(folder: Path) -> tuple[GPT2Config, dict[str, LazyTensor]]:
    """Hugging Face's layout: names without prefix, linear layers turned to (out, in)."""
    if not (folder / "config.json").exists():
        what = "no config.json" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}; give a model's folder")
    config = read_config(folder / "config.json")
    found = open_hf_weights(folder)
    prefix = "transformer." if "transformer.wte.weight" in found else ""
    if config.tied_head and HEAD in found:  # stored twice, or not tied at all
        tied = is_copy(found[HEAD], found.get(f"{prefix}wte.weight"))
        config = replace(config, tied_head=tied)
    tensors = {}
    for key, lazy in found.items():
        name = key.removeprefix(prefix)
        if prefix and name == key and BARE.match(key):
            raise UserError(f"{lazy.source}: {key} lacks the prefix {prefix} of the others; give "
                            "the file of one model, as it was written")  # fmt: skip
        if SKIPPED.fullmatch(name) or (config.tied_head and name == HEAD):
            continue
        if TRANSPOSED.fullmatch(name) and len(lazy.shape) == 2:
            lazy = lazy.through(Tensor.t, lazy.shape[::-1])
        add_once(tensors, name, lazy, key)
    return config, tensors


def read_config(path: Path) -> GPT2Config:
    """GPT2Config of a config.json. Errors: UserError for what the model does not implement."""
    p = Fields(path)
    p.check_kind("gpt2")
    width = p.whole("n_embd")
    refused = {
        "architectures": p.get("architectures") not in (None, ["GPT2LMHeadModel"], ["GPT2Model"]),
        "activation_function": p.get("activation_function", "gelu_new")
        not in ("gelu_new", "gelu_pytorch_tanh"),
        "n_inner": p.get("n_inner") not in (None, 4 * width),
        "scale_attn_weights": not p.get("scale_attn_weights", True),
        "scale_attn_by_inverse_layer_idx": p.get("scale_attn_by_inverse_layer_idx", False),
        "add_cross_attention": p.get("add_cross_attention", False),
        "quantization_config": p.get("quantization_config") is not None,
    }
    p.refuse(refused, "GPT-2")
    return p.build(
        GPT2Config,
        width, p.whole("n_layer"), p.whole("n_head"), p.whole("vocab_size", 50257),
        p.whole("n_positions", 1024), p.number("layer_norm_epsilon", 1e-5),
        p.get("tie_word_embeddings", True) is not False,
    )  # fmt: skip


def save_gpt2(model: GPT2, tokenizer: GPT2Tokenizer, folder: str | Path) -> None:
    """Writes a Hugging Face folder that transformers loads unchanged, in the model's own dtype.

    Errors: UserError if the model carries LoRA layers: those are saved by save_adapter.
    """
    folder = Path(folder)
    check_saveable(model, folder)
    tensors = {
        name if name.startswith(model.HEAD) else f"transformer.{name}":
        weight.t() if TRANSPOSED.fullmatch(name) else weight
        for name, weight in model.state_dict().items()
    }
    write_hf(folder, model, tokenizer, tensors, _to_hf_config(model.config), {
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": model.config.max_seq_len,
        "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
        "add_prefix_space": False, "clean_up_tokenization_spaces": False,
    })  # fmt: skip


def _to_hf_config(c: GPT2Config) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": c.dim,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_positions": c.max_seq_len,
        "n_inner": None,
        "vocab_size": c.vocab_size,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": "gelu_new",
    }
