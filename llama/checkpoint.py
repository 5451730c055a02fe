"""LLaMA weights in and out: Meta folders, Hugging Face folders, llama2.c files.

The one place where a tensor has a second name. Its trap: Hugging Face rotates halves where Meta
rotates neighbours, so the rows of wq and wk (and of lora_B on them) are permuted between the two.
"""

import math
import re
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from llama.model import Llama, LlamaConfig
from llama.tokenizer import LlamaTokenizer
from minillm.errors import UserError
from minillm.weights import (
    LazyTensor,
    assign_weights,
    check_names,
    check_readable,
    empty_model,
    hf_weight_files,
    open_weights,
    read_json,
    rope_halves,
    rope_to_halves,
    write_json,
    write_safetensors,
)

HF_MODULES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
IGNORED = re.compile(r"rope\.freqs|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
# how Meta's model parallelism split each matrix: by rows (0) or by columns (1)
SHARD_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0}
SHARD_DIM |= {"wo": 1, "w2": 1, "tok_embeddings": 1}


def load_llama(
    path: str | Path,
    n_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: str | Path | None = None,
) -> tuple[Llama, LlamaTokenizer]:
    """A model and its tokenizer from a Meta folder, a Hugging Face folder, or a llama2.c .bin.

    `n_layers` keeps the first blocks and reads no other; `tokenizer` names a file where the model
    has none beside it. Tensors stream one by one into `dtype` on `device`: host memory stays
    within the model plus one tensor. Errors: UserError naming the file, what is wrong with it and
    every missing, unexpected or misshapen tensor.
    """
    path = Path(path)
    if path.is_file():
        config, tensors = open_llama2c(path)
    elif (path / "params.json").exists():
        config, tensors = open_meta(path)
    elif (path / "config.json").exists():
        config, tensors = open_hf(path)
    elif path.is_dir():
        raise UserError(f"{path}: neither params.json nor config.json; give a model's folder")
    else:
        raise UserError(f"{path}: no such file or folder; check the path")
    if n_layers is not None:
        if not 1 <= n_layers <= config.n_layers:
            raise UserError(f"{path}: has {config.n_layers} layers, not {n_layers}; lower --layers")
        dropped = re.compile(r"layers\.(\d+)\.")
        tensors = {
            name: lazy
            for name, lazy in tensors.items()
            if not ((m := dropped.match(name)) and n_layers <= int(m[1]) < config.n_layers)
        }
        config = replace(config, n_layers=n_layers)
    text = LlamaTokenizer(tokenizer or find_tokenizer(path))
    check_tokenizer(text, config, tokenizer or path)
    model = empty_model(lambda: Llama(config))
    assign_weights(model, tensors, path, dtype, device)
    return model, text


def find_tokenizer(path: Path) -> Path:
    """The tokenizer file of a model: in its folder, or beside it for a single file."""
    folder = path if path.is_dir() else path.parent
    for name in ("tokenizer.model", "tokenizer.bin", "tok512.bin"):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{folder}: no tokenizer.model or tokenizer.bin; give one with --tokenizer")


def check_tokenizer(tokenizer: LlamaTokenizer, config: LlamaConfig, where: str | Path) -> None:
    """Errors: UserError if ids would not fit the embedding, or most of it would never be used
    (some models pad their vocabulary, by less than 1,024 rows)."""
    if not 0 <= config.vocab_size - tokenizer.vocab_size < 1024:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} pieces, the model "
            f"{config.vocab_size}; give the tokenizer the model was trained with"
        )


def open_meta(folder: Path) -> tuple[LlamaConfig, dict[str, LazyTensor]]:
    """Meta's layout: params.json and consolidated.NN.pth, one file per model-parallel rank."""
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{folder}: no consolidated.00.pth beside params.json; download it")
    shards = [open_weights([file]) for file in files]
    shards = [{k: t for k, t in shard.items() if not IGNORED.fullmatch(k)} for shard in shards]
    for file, shard in zip(files, shards, strict=True):
        check_names(dict.fromkeys(shards[0], ()), dict.fromkeys(shard, ()), file)
    tensors = {name: _join([shard[name] for shard in shards], name) for name in shards[0]}
    return _meta_config(folder / "params.json", tensors), tensors


def _join(pieces: list[LazyTensor], name: str) -> LazyTensor:
    """One tensor from the pieces of all ranks; vectors are copies of each other."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if len(first.shape) == 1:
        return LazyTensor(first.shape, first.source, lambda out: _fill_equal(pieces, out, name))
    dim = SHARD_DIM.get(name.removesuffix(".weight").split(".")[-1], 0)
    if any(len(p.shape) != 2 or p.shape[1 - dim] != first.shape[1 - dim] for p in pieces):
        raise UserError(f"{first.source}: the shards of {name} do not fit together; check them")
    shape, widths = list(first.shape), [p.shape[dim] for p in pieces]
    shape[dim] = sum(widths)

    def fill(out: torch.Tensor) -> None:
        for piece, part in zip(pieces, out.split(widths, dim), strict=True):
            piece.fill(part)

    return LazyTensor(tuple(shape), first.source, fill)


def _fill_equal(pieces: list[LazyTensor], out: torch.Tensor, name: str) -> None:
    pieces[0].fill(out)
    for piece in pieces[1:]:
        piece.fill(copy := torch.empty_like(out))
        if not torch.equal(copy, out):
            raise UserError(f"{piece.source}: {name} differs between shards; download them again")


def _meta_config(path: Path, tensors: dict[str, LazyTensor]) -> LlamaConfig:
    """LlamaConfig of a params.json; the feed-forward's width follows from dim (Meta's rule)."""
    p = _Fields(path)
    dim, multiple = p.whole("dim"), p.whole("multiple_of", 256)
    hidden = int(p.number("ffn_dim_multiplier", 1.0) * int(8 * dim / 3))
    hidden = multiple * math.ceil(hidden / multiple)
    vocab = p.get("vocab_size", -1)
    if vocab == -1:  # "ask the tokenizer": the embedding knows as well
        embedding = tensors.get("tok_embeddings.weight")
        vocab = embedding.shape[0] if embedding else 32000
    heads = p.whole("n_heads")
    return p.config(
        dim, p.whole("n_layers"), heads, p.whole("n_kv_heads", heads), vocab, hidden,
        p.number("norm_eps"), p.number("rope_theta", 10000.0), p.whole("max_seq_len", 4096),
        "output.weight" not in tensors,
    )  # fmt: skip


def open_hf(folder: Path) -> tuple[LlamaConfig, dict[str, LazyTensor]]:
    """Hugging Face's layout, renamed to Meta's and with q and k back in neighbouring pairs."""
    config = _hf_config(folder / "config.json")
    found = open_weights(hf_weight_files(folder))
    found = {name.removeprefix("_orig_mod."): t for name, t in found.items()}
    names = hf_names(config)
    ours = {hf: (name, heads) for name, (hf, heads) in names.items()}
    tensors = {}
    for key, lazy in found.items():
        if IGNORED.fullmatch(key) or (config.tied_head and key == "lm_head.weight"):
            continue  # a tied head may be stored twice
        name, heads = ours.get(key.removesuffix(".weight"), (None, 0))
        if heads:
            lazy = lazy.through(lambda out, heads=heads: rope_halves(out, heads))
        tensors[f"{name}.weight" if name else key] = lazy
    return config, tensors


def _hf_config(path: Path) -> LlamaConfig:
    """LlamaConfig of a config.json. Errors: UserError for what the model does not implement."""
    p = _Fields(path)
    rope, scaling = p.table("rope_parameters"), p.table("rope_scaling")
    kinds = {rope.get("rope_type"), scaling.get("rope_type"), scaling.get("type")}
    heads = p.whole("num_attention_heads")
    refused = {
        "model_type": p.get("model_type", "llama") != "llama",
        "rope_scaling": bool(kinds - {None, "default"}) or "factor" in scaling,
        "attention_bias": p.get("attention_bias", False),
        "mlp_bias": p.get("mlp_bias", False),
        "hidden_act": p.get("hidden_act", "silu") != "silu",
        "head_dim": p.get("head_dim") not in (None, p.whole("hidden_size") // heads),
    }
    for field, bad in refused.items():
        if bad:
            raise UserError(f"{path}: {field} {p.get(field)!r} is not LLaMA-2; not supported")
    theta = rope.get("rope_theta") or p.number("rope_theta", 10000.0)
    return p.config(
        p.whole("hidden_size"), p.whole("num_hidden_layers"), heads,
        p.whole("num_key_value_heads", heads), p.whole("vocab_size"),
        p.whole("intermediate_size"), p.number("rms_norm_eps", 1e-6), theta,
        p.whole("max_position_embeddings", 2048), bool(p.get("tie_word_embeddings", False)),
    )  # fmt: skip


class _Fields:
    """The fields of a JSON object, each checked as it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.content = read_json(path)
        if not isinstance(self.content, dict):
            raise UserError(f"{path}: no JSON object; give the model's own file")

    def get(self, name: str, default=None):
        value = self.content.get(name)
        return default if value is None else value

    def table(self, name: str) -> dict:
        value = self.get(name, {})
        return value if isinstance(value, dict) else {"rope_type": repr(value)}

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise UserError(f"{self.path}: {name} is {value!r}, no positive whole number; fix it")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{self.path}: {name} is {value!r}, no positive number; fix it")
        return float(value)

    def config(self, *sizes) -> LlamaConfig:
        try:
            return LlamaConfig(*sizes)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None


def open_llama2c(path: Path) -> tuple[LlamaConfig, dict[str, LazyTensor]]:
    """llama2.c's legacy .bin: seven int32, then fp32 matrices kind by kind, in Meta's layout."""
    check_readable(path)
    head = path.open("rb").read(28)
    if len(head) < 28 or head[:4] == b"24ka":
        raise UserError(f"{path}: no legacy llama2.c export (version 0); export it again as one")
    dim, hidden, n_layers, n_heads, n_kv_heads, vocab, seq_len = struct.unpack("<7i", head)
    try:
        config = LlamaConfig(
            dim, n_layers, n_heads, n_kv_heads, abs(vocab), hidden,
            max_seq_len=seq_len, tied_head=vocab > 0,
        )  # fmt: skip
    except (UserError, ZeroDivisionError):
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
            load = partial(np.fromfile, path, "<f4", math.prod(shape), offset=at)
            tensors[f"{name}.weight"] = LazyTensor.read_by(
                lambda load=load: torch.from_numpy(load()), shape, path
            )
        at += 4 * math.prod(shape)
    if path.stat().st_size != at:
        raise UserError(f"{path}: {path.stat().st_size} bytes, its header asks for {at}; fetch it")
    return config, tensors


def hf_names(config: LlamaConfig) -> dict[str, tuple[str, int]]:
    """{our module: (Hugging Face's name, heads whose rows are permuted, 0 for none)}."""
    heads = {"attention.wq": config.n_heads, "attention.wk": config.n_kv_heads}
    names = {"tok_embeddings": ("model.embed_tokens", 0), "norm": ("model.norm", 0)}
    names["output"] = ("lm_head", 0)
    for i in range(config.n_layers):
        for ours, theirs in HF_MODULES.items():
            names[f"layers.{i}.{ours}"] = (f"model.layers.{i}.{theirs}", heads.get(ours, 0))
    return names


def save_llama(model: Llama, tokenizer: LlamaTokenizer, folder: str | Path) -> None:
    """Writes a Hugging Face folder that transformers loads unchanged, in the model's own dtype.

    Errors: UserError if the model carries LoRA layers: those are saved by save_adapter.
    """
    folder = Path(folder)
    state = model.state_dict()
    if any(".lora_" in name for name in state):
        raise UserError(f"{folder}: the model has LoRA layers; save_adapter, or fold_lora first")
    names = hf_names(model.config)
    tensors = {}
    for key, weight in state.items():
        hf, heads = names[key.removesuffix(".weight")]
        tensors[f"{hf}.weight"] = rope_to_halves(weight, heads) if heads else weight
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", _to_hf_config(model, tokenizer))
    tokenizer.save(folder / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": True,
        "clean_up_tokenization_spaces": False, "model_max_length": model.config.max_seq_len,
    })  # fmt: skip
    write_safetensors(folder / "model.safetensors", tensors)


def _to_hf_config(model: Llama, tokenizer: LlamaTokenizer) -> dict:
    c = model.config
    dtype = str(model.tok_embeddings.weight.dtype).removeprefix("torch.")
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
        "tie_word_embeddings": c.tied_head,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
