"""LLaMA's tokenizer: SentencePiece, from tokenizer.model or from llama2.c's tokenizer .bin.

A llama2.c file holds pieces and scores of a BPE model; it is turned into the SentencePiece
model that it came from, so that one library does all the encoding.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from minillm.errors import UserError
from minillm.weights import atomic_file, check_readable


class LlamaTokenizer:
    """Text to ids and back, from a file on disk only.

    Errors: UserError naming a file that is missing or no tokenizer.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        check_readable(path)
        raw = path.read_bytes()
        self.model_proto = _from_llama2c(raw, path) if path.suffix == ".bin" else raw
        try:
            self.pieces = SentencePieceProcessor(model_proto=self.model_proto)
        except Exception as error:
            raise UserError(
                f"{path}: no SentencePiece model ({' '.join(str(error).split())[:60]}); "
                "give Llama's tokenizer.model or llama2.c's tokenizer.bin"
            ) from None
        self.vocab_size: int = self.pieces.vocab_size()
        self.bos_id: int = self.pieces.bos_id()
        self.eos_id: int = self.pieces.eos_id()
        # Llama has no padding (-1, which no embedding holds): any valid id will do, as paddings
        # are known by their place
        self.pad_id: int = max(self.pieces.pad_id(), 0)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of the text, never a control token for what is only written like one ("<s>")."""
        try:
            ids = self.pieces.encode(text)
        except (UnicodeEncodeError, RuntimeError, TypeError):
            raise UserError("text holds a lone surrogate, no valid Unicode; clean it") from None
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens vanish. One token alone loses its leading space and
        may be half a character: decode the growing sequence instead."""
        return self.pieces.decode(list(ids))

    def save(self, path: Path) -> None:
        """Writes the SentencePiece model."""
        with atomic_file(path) as temporary:
            temporary.write_bytes(self.model_proto)


UNKNOWN, CONTROL, BYTE, NORMAL = 2, 3, 6, 1  # SentencePiece's piece types


def _from_llama2c(raw: bytes, path: Path) -> bytes:
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
    bpe = _number(3, 2) + _number(4, token) + _number(35, 1)  # type, vocabulary, byte fallback
    spaces = _number(3, 1) + _number(4, 0) + _number(5, 1)  # dummy prefix, keep runs, escape
    return proto + _field(2, bpe) + _field(3, _field(1, b"identity") + spaces)


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
