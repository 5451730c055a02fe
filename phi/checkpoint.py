"""Phi weights in and out: Hugging Face folders, whose names are ours under `model.`."""

from pathlib import Path

import torch

from minillm.bpe_tokenizer import find_vocabulary
from minillm.checkpoint import (
    check_saveable,
    check_tokenizer,
    empty_model,
    keep_first_layers,
    write_hf,
)
from minillm.config import with_layers
from minillm.errors import UserError
from minillm.files import Fields
from minillm.hub import Official
from minillm.weights import LazyTensor, add_once, assign_weights, open_hf_weights
from phi.model import Phi, PhiConfig
from phi.tokenizer import PhiTokenizer

_FILES = (
    "config.json", "vocab.json", "merges.txt", "added_tokens.json", "model.safetensors",
)  # fmt: skip
OFFICIAL = {"phi-1.5": Official("microsoft/phi-1_5", _FILES)}


def load_phi(
    path: str | Path,
    n_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: str | Path | None = None,
) -> tuple[Phi, PhiTokenizer]:
    """A model and its tokenizer from the official Hugging Face folder.

    `n_layers` keeps the first blocks and reads no other; `tokenizer` names a folder or file where
    the model has none beside it (without one, text is taken as bytes, with a warning). Tensors
    stream one by one into `dtype` on `device`: host memory stays within the model itself. Errors:
    UserError naming the file, what is wrong with it and every missing, unexpected or misshapen
    tensor.
    """
    path = Path(path)
    whole, tensors = open_hf(path)
    config = with_layers(whole, n_layers, path)
    tensors = keep_first_layers(tensors, "layers", whole.n_layers, config.n_layers)
    text = PhiTokenizer(tokenizer or find_vocabulary(path))
    check_tokenizer(text, config.vocab_size, path)
    model = empty_model(lambda: Phi(config))
    assign_weights(model, tensors, path, dtype, device)
    return model, text


def open_hf(folder: Path) -> tuple[PhiConfig, dict[str, LazyTensor]]:
    """Hugging Face's layout, its names without `model.`."""
    if not (folder / "config.json").exists():
        what = "no config.json" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}; give a model's folder")
    config = read_config(folder / "config.json")
    tensors: dict[str, LazyTensor] = {}
    for key, lazy in open_hf_weights(folder).items():
        add_once(tensors, key.removeprefix("model."), lazy, key)
    return config, tensors


def read_config(path: Path) -> PhiConfig:
    """PhiConfig of a config.json. Errors: UserError for what the model does not implement."""
    p = Fields(path)
    p.check_kind("phi")
    p.take_rope()
    heads, width = p.whole("num_attention_heads"), p.whole("hidden_size")
    refused = {
        "architectures": p.get("architectures") not in (None, ["PhiForCausalLM"]),
        "hidden_act": p.get("hidden_act", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"),
        "qk_layernorm": p.get("qk_layernorm", False),
        "tie_word_embeddings": p.get("tie_word_embeddings", False),
        "quantization_config": p.get("quantization_config") is not None,
    }
    p.refuse(refused, "Phi-1.5")
    return p.build(
        PhiConfig,
        width, p.whole("num_hidden_layers"), heads, p.whole("num_key_value_heads", heads),
        p.whole("vocab_size", 51200), p.whole("intermediate_size", 4 * width),
        p.number("layer_norm_eps", 1e-5), p.number("rope_theta", 10000.0),
        p.number("partial_rotary_factor", 0.5),
        p.whole("max_position_embeddings", 2048),
    )  # fmt: skip


def save_phi(model: Phi, tokenizer: PhiTokenizer, folder: str | Path) -> None:
    """Writes a Hugging Face folder that transformers loads unchanged, in the model's own dtype.

    Errors: UserError if the model carries LoRA layers (those are saved by save_adapter), or has a
    tied head, which transformers' Phi has only with a bias.
    """
    folder = Path(folder)
    check_saveable(model, folder)
    if model.config.tied_head:
        raise UserError(f"{folder}: a Phi with a tied head has no files; give it one of its own")
    tensors = {
        name if name.startswith(f"{model.HEAD}.") else f"model.{name}": weight
        for name, weight in model.state_dict().items()
    }
    write_hf(folder, model, tokenizer, tensors, _to_hf_config(model.config))


def _to_hf_config(c: PhiConfig) -> dict:
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "max_position_embeddings": c.max_seq_len,
        "vocab_size": c.vocab_size,
        "layer_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "partial_rotary_factor": c.rotary_share,
        "hidden_act": "gelu_new",
        "qk_layernorm": False,
        "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip
