"""Meta's own folders: params.json and consolidated.NN.pth, one file per model-parallel rank."""

import math
from pathlib import Path

import torch

from llama.model import LlamaConfig
from minillm.errors import UserError
from minillm.files import Fields
from minillm.weights import LazyTensor, check_names, open_weights

# how Meta's model parallelism split each matrix: by rows (0) or by columns (1)
SHARD_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0}
SHARD_DIM |= {"wo": 1, "w2": 1, "tok_embeddings": 1}


def open_meta(folder: Path) -> tuple[LlamaConfig, dict[str, LazyTensor]]:
    """Meta's layout: params.json and consolidated.NN.pth, one file per model-parallel rank."""
    files = sorted(folder.glob("consolidated.*.pth"))
    names = {file.name for file in files} | {"consolidated.00.pth"}
    for name in (f"consolidated.{rank:02d}.pth" for rank in range(len(names))):
        if not (folder / name).exists():
            raise UserError(f"{folder}: no {name} beside params.json; download it")
    shards = [open_weights([file]) for file in files]
    shards = [{k: t for k, t in shard.items() if k != "rope.freqs"} for shard in shards]
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
    p = Fields(path)
    others = ("use_scaled_rope", "sliding_window", "moe")  # of Llama 3.1, Mistral, Mixtral
    p.refuse({field: bool(p.get(field)) for field in others}, "LLaMA-2")
    dim, multiple = p.whole("dim"), p.whole("multiple_of", 256)
    hidden = int(min(p.number("ffn_dim_multiplier", 1.0), 1e6) * int(8 * dim / 3))
    hidden = multiple * math.ceil(hidden / multiple)
    vocab = p.get("vocab_size", -1)
    if vocab == -1:  # "ask the tokenizer": the embedding knows as well
        embedding = tensors.get("tok_embeddings.weight")
        vocab = embedding.shape[0] if embedding else 32000
    heads = p.whole("n_heads")
    p.refuse({"head_dim": p.get("head_dim") not in (None, dim // heads)}, "LLaMA-2")
    return p.build(
        LlamaConfig,
        dim, p.whole("n_layers"), heads, p.whole("n_kv_heads", heads), vocab, hidden,
        p.number("norm_eps"), p.number("rope_theta", 10000.0), p.whole("max_seq_len", 4096),
        False,  # a head that is not there was lost
    )  # fmt: skip
