"""LLaMA weights in and out: Meta folders, Hugging Face folders, llama2.c files.

The trap: Hugging Face rotates halves where Meta rotates neighbours, so the rows of wq and wk are
permuted between the two (llama/names.py says which).
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from llama.llama2c import open_llama2c
from llama.meta import open_meta
from llama.model import Llama, LlamaConfig
from llama.names import hf_names
from llama.tokenizer import LlamaTokenizer, find_tokenizer
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
from minillm.weights import (
    LazyTensor,
    add_once,
    assign_weights,
    open_hf_weights,
    rope_halves,
    rope_to_halves,
)

_FILES = ("config.json", "tokenizer.model", "model.safetensors.index.json")
_PIECES = {"tokenizer.model": "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"}
OFFICIAL = {
    f"llama-2-{size}": Official(f"meta-llama/Llama-2-{size}-hf", _FILES, _PIECES, gated=True)
    for size in ("7b", "13b", "70b")
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SKIPPED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def load_llama(
    path: str | Path,
    n_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: str | Path | None = None,
) -> tuple[Llama, LlamaTokenizer]:
    """A model and its tokenizer from a Meta folder, a Hugging Face folder, or a llama2.c .bin.

    `n_layers` keeps the first blocks and reads no other; `tokenizer` names a file where the model
    has none beside it (without one, text is taken as bytes, with a warning). Tensors stream one
    by one into `dtype` on `device`: host memory stays within the model itself. Errors:
    UserError naming the file, what is wrong with it and every missing, unexpected or misshapen
    tensor.
    """
    path = Path(path)
    whole, tensors = open_checkpoint(path)
    config = with_layers(whole, n_layers, path)
    tensors = keep_first_layers(tensors, "layers", whole.n_layers, config.n_layers)
    text = LlamaTokenizer(tokenizer) if tokenizer else _own_tokenizer(path)
    check_tokenizer(text, config.vocab_size, path)
    model = empty_model(lambda: Llama(config))
    assign_weights(model, tensors, path, dtype, device)
    return model, text


def open_checkpoint(path: Path) -> tuple[LlamaConfig, dict[str, LazyTensor]]:
    """Config and tensors (none loaded yet, in our names) of any layout, known by its files."""
    if path.suffix in (".safetensors", ".pth") and path.is_file():
        raise UserError(f"{path}: a file of weights alone; give the folder it is in")
    if path.is_file():
        return open_llama2c(path)
    is_hf = (path / "config.json").exists()
    if (path / "params.json").exists() and not (is_hf and not any(path.glob("consolidated.*.pth"))):
        return open_meta(path)
    if is_hf:
        return open_hf(path)
    if path.is_dir():
        raise UserError(f"{path}: neither params.json nor config.json; give a model's folder")
    raise UserError(f"{path}: no such file or folder; check the path")


def _own_tokenizer(path: Path) -> LlamaTokenizer:
    """The model's own; bytes, with a warning, where it is of another kind (Llama 3's)."""
    found = find_tokenizer(path)
    try:
        return LlamaTokenizer(found)
    except UserError as error:
        if found.suffix != ".json":
            raise
        print(f"warning: {error}", file=sys.stderr)
        return LlamaTokenizer(None)


def open_hf(folder: Path) -> tuple[LlamaConfig, dict[str, LazyTensor]]:
    """Hugging Face's layout, renamed to Meta's and with q and k back in neighbouring pairs."""
    config = read_config(folder / "config.json")
    found = open_hf_weights(folder)
    names = hf_names(config.n_layers, config.n_heads, config.n_kv_heads)
    ours = {hf: (name, heads) for name, (hf, heads) in names.items()}
    if config.tied_head and HEAD in found:  # stored twice, or not tied at all
        config = replace(config, tied_head=is_copy(found[HEAD], found.get(EMBEDDING)))
    tensors = {}
    for key, lazy in found.items():
        if SKIPPED.fullmatch(key) or (config.tied_head and key == HEAD):
            continue
        module, _, leaf = key.rpartition(".")
        if module in names:
            raise UserError(f"{lazy.source}: {key} is Meta's name, in a file of Hugging Face's; "
                            "convert the model again")  # fmt: skip
        name, heads = ours.get(module, (None, 0)) if leaf == "weight" else (None, 0)
        if heads:
            lazy = lazy.through(lambda out, heads=heads: rope_halves(out, heads))
        add_once(tensors, f"{name}.weight" if name else key, lazy, key)
    return config, tensors


def read_config(path: Path) -> LlamaConfig:
    """LlamaConfig of a config.json. Errors: UserError for what the model does not implement."""
    p = Fields(path)
    p.check_kind("llama")
    p.take_rope()
    heads = p.whole("num_attention_heads")
    refused = {
        "architectures": p.get("architectures") not in (None, ["LlamaForCausalLM"]),
        "partial_rotary_factor": p.number("partial_rotary_factor", 1.0) != 1.0,
        "sliding_window": p.get("sliding_window") is not None,
        "quantization_config": p.get("quantization_config") is not None,
        "attention_bias": p.get("attention_bias", False),
        "mlp_bias": p.get("mlp_bias", False),
        "hidden_act": p.get("hidden_act", "silu") != "silu",
        "head_dim": p.get("head_dim") not in (None, p.whole("hidden_size") // heads),
    }
    p.refuse(refused, "LLaMA-2")
    return p.build(
        LlamaConfig,
        p.whole("hidden_size"), p.whole("num_hidden_layers"), heads,
        p.whole("num_key_value_heads", heads), p.whole("vocab_size"),
        p.whole("intermediate_size"), p.number("rms_norm_eps", 1e-6),
        p.number("rope_theta", 10000.0),
        p.whole("max_position_embeddings", 2048), bool(p.get("tie_word_embeddings", False)),
    )  # fmt: skip


def save_llama(model: Llama, tokenizer: LlamaTokenizer, folder: str | Path) -> None:
    """Writes a Hugging Face folder that transformers loads unchanged, in the model's own dtype.

    Errors: UserError if the model carries LoRA layers: those are saved by save_adapter.
    """
    folder = Path(folder)
    check_saveable(model, folder)
    names = model.hf_names()
    tensors = {}
    for key, weight in model.state_dict().items():
        hf, heads = names[key.removesuffix(".weight")]
        tensors[f"{hf}.weight"] = rope_to_halves(weight, heads) if heads else weight
    write_hf(folder, model, tokenizer, tensors, _to_hf_config(model.config), {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": True,
        "clean_up_tokenization_spaces": False, "model_max_length": model.config.max_seq_len,
    })  # fmt: skip


def _to_hf_config(c: LlamaConfig) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
