"""SentencePiece models made from what is none: llama2.c's tokenizer.bin, Hugging Face's
tokenizer.json, no file at all. So one library does all the encoding."""

import struct
import sys
from pathlib import Path

from minillm.errors import UserError
from minillm.files import Fields

UNKNOWN, CONTROL, BYTE, NORMAL = 2, 3, 6, 1  # SentencePiece's piece types
SETTINGS = {2, 3}  # of training and of normalization: a ModelProto's fields after its pieces
SPACE = "\u2581"  # how SentencePiece writes a space
FIRST = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]  # ids 0 to 258


def llama2c_proto(raw: bytes, path: Path) -> bytes:
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


def json_proto(path: Path) -> bytes:
    """From Hugging Face's tokenizer.json, all that transformers 5 writes, of a model that was
    SentencePiece's before: a piece scores the higher the earlier the merge that makes it. Errors:
    UserError for a broken file, or another kind of tokenizer (Llama 3's)."""
    p = Fields(path)
    model, added = p.table("model"), p.get("added_tokens", [])
    vocab, merges = model.get("vocab"), model.get("merges")
    try:
        later = {token["content"]: token["id"] for token in added if token["id"] >= len(vocab)}
        pieces = {token: piece for piece, token in (vocab | later).items()}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        made = {left + right: rank for rank, (left, right) in reversed([*enumerate(pairs)])}
        is_plain = model["type"] == "BPE" and model["byte_fallback"] and _is_sentencepiece(p)
        texts = [pieces[token] for token in range(len(vocab) + len(later))]
        raw = [text.encode() for text in texts]
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UserError(f"{path}: no tokenizer of Llama's kind; give its tokenizer.model by "
                        "--tokenizer") from None  # fmt: skip
    if not is_plain or texts[:259] != FIRST:
        raise UserError(f"{path}: another kind of tokenizer than Llama 2's; not supported")
    tell_unread(path, [*later])
    proto = b"".join(
        _field(1, _piece(token, raw[token], -float(made.get(text, len(made))), text in later))
        for token, text in enumerate(texts)
    )
    return _with_settings(proto, len(texts), spaces=True)


def tell_unread(path: Path, added: list[str]) -> None:
    """Warns of the tokens that a file adds to SentencePiece's own: no text becomes one of them."""
    if added:
        print(f"warning: {path}: tokens added later ({', '.join(added[:3])}) are taken as plain "
              "text", file=sys.stderr)  # fmt: skip


def _is_sentencepiece(p: Fields) -> bool:
    """Whether a text gets a space in front and its spaces are written as U+2581, by a normalizer
    or a pre-tokenizer, and nothing else is done to it."""
    before, after = p.table("normalizer"), p.table("pre_tokenizer")
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if p.table("model").get("end_of_word_suffix") or before and after:
        return False
    if before:
        return before.get("normalizers") == [prepend, replace]
    scheme, is_space = after.get("prepend_scheme"), after.get("replacement") == SPACE
    return after.get("type") == "Metaspace" and is_space and scheme in ("first", "always")


def byte_proto() -> bytes:
    """A model of the three control tokens and the 256 bytes: any text, no vocabulary."""
    pieces = (_piece(token, text.encode(), 0.0) for token, text in enumerate(FIRST))
    proto = b"".join(_field(1, piece) for piece in pieces)
    return _with_settings(proto, len(FIRST), spaces=False)


def _with_settings(pieces: bytes, n_pieces: int, spaces: bool) -> bytes:
    """BPE with byte fallback; `spaces`: text gets one in front, and all are written as U+2581."""
    bpe = _number(3, 2) + _number(4, n_pieces) + _number(35, 1)  # type, size, byte fallback
    normal = _number(3, spaces) + _number(4, 0) + _number(5, spaces)  # prefix, keep runs, escape
    return pieces + _field(2, bpe) + _field(3, _field(1, b"identity") + normal)


def _piece(token: int, text: bytes, score: float, is_control: bool = False) -> bytes:
    """One vocabulary entry: ids 0 to 2 are control tokens, 3 to 258 the bytes, then BPE pieces (or
    more control tokens)."""
    kind = BYTE if token < len(FIRST) else NORMAL
    if token < 3 or is_control:
        kind = CONTROL if token else UNKNOWN
    text = FIRST[token].encode() if token < 3 else text.replace(b" ", SPACE.encode())
    return _field(1, text) + b"\x15" + struct.pack("<f", score) + _number(3, kind)


def lacks_settings(raw: bytes) -> bool:
    """Whether a ModelProto of whole fields has not both kinds of settings: one cut between two."""
    at, seen = 0, set()
    try:
        while at < len(raw):
            tag, at = _read_varint(raw, at)
            size, at = _read_varint(raw, at)
            if tag & 7 != 2:
                return False
            seen.add(tag >> 3)
            at += size
    except IndexError:
        return False
    return at == len(raw) and bool(SETTINGS - seen)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    value, shift = 0, 0
    while True:
        value |= (raw[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if raw[at - 1] < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low]) if not rest else bytes([low | 0x80]) + _varint(rest)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    """A varint protobuf field."""
    return _varint(number << 3) + _varint(value)
