"""llama2.c's files: small real models (weights .bin) and their tokenizers (tokenizer .bin)."""

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


UNKNOWN, CONTROL, BYTE, NORMAL = 2, 3, 6, 1  # SentencePiece's piece types


def sentencepiece_proto(raw: bytes, path: Path) -> bytes:
    """The SentencePiece ModelProto of a llama2.c tokenizer file: max length, then per token
    float32 score, int32 length and the bytes, all little-endian."""
    proto, at, token = b"", 4, 0
    while at < len(raw):
        if at + 8 > len(raw):
            raise UserError(f"{path}: ends inside token {token}; download it again")
        score, length = struct.unpack_from("<fi", raw, at)
        text = raw[at + 8 : at + 8 + length]
        if length < 0 or len(text) < length:
            raise UserError(f"{path}: ends inside token {token}; download it again")
        proto += _field(1, _piece(token, text, score))
        at, token = at + 8 + length, token + 1
    if token < 259:
        raise UserError(f"{path}: {token} tokens, fewer than the 256 bytes; not a llama2.c file")
    return _with_settings(proto, token, spaces=True)


def byte_proto() -> bytes:
    """A model of the three control tokens and the 256 bytes: any text, no vocabulary."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256))]
    proto = b"".join(_field(1, _piece(token, text, 0.0)) for token, text in enumerate(pieces))
    return _with_settings(proto, len(pieces), spaces=False)


def _with_settings(pieces: bytes, n_pieces: int, spaces: bool) -> bytes:
    """BPE with byte fallback; `spaces`: text gets one in front, and all are written as U+2581."""
    bpe = _number(3, 2) + _number(4, n_pieces) + _number(35, 1)  # type, size, byte fallback
    normal = _number(3, spaces) + _number(4, 0) + _number(5, spaces)  # prefix, keep runs, escape
    return pieces + _field(2, bpe) + _field(3, _field(1, b"identity") + normal)


def _piece(token: int, text: bytes, score: float) -> bytes:
    """One vocabulary entry: ids 0 to 2 are control tokens, 3 to 258 the bytes, then BPE pieces."""
    names = {0: b"<unk>", 1: b"<s>", 2: b"</s>"}
    kind = UNKNOWN if token == 0 else CONTROL if token < 3 else BYTE if token < 259 else NORMAL
    text = names.get(token, text.replace(b" ", "\u2581".encode()))
    return _field(1, text) + b"\x15" + struct.pack("<f", score) + _number(3, kind)


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low]) if not rest else bytes([low | 0x80]) + _varint(rest)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    """A varint protobuf field."""
    return _varint(number << 3) + _varint(value)
