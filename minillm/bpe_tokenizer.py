"""The byte-level BPE of GPT-2 and its kin: a tiktoken.Encoding built from local files.

Files: vocab.json and merges.txt as OpenAI and Hugging Face have them, or one .tiktoken file. In
the first two a token is written in an alphabet of 256 visible characters, one for each byte.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from minillm.bpe import BYTES, OTHERS, PATTERN, PRINTABLE, merges, train_bpe
from minillm.errors import UserError
from minillm.files import Fields, atomic_file, read_json, read_text, write_json

END = "<|endoftext|>"
LETTERS = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(256 + i) for i, byte in enumerate(OTHERS)
}
BYTE_OF = {letter: byte for byte, letter in LETTERS.items()}


class BPETokenizer:
    """Text to ids and back, from a file on disk only; path None takes every byte as a token.

    `path` is a folder with vocab.json and merges.txt (or tokenizer.json, which holds both), one of
    these files, or a .tiktoken file. There is one control token, <|endoftext|>: it begins a text,
    ends it and fills paddings. Plain tokens that a vocabulary got later (added_tokens.json, as
    Phi's runs of spaces) are taken out of a text first, the longest before the shorter.
    Errors: UserError naming a file that is missing or no vocabulary.
    """

    adds_space = False  # a word's leading space is in its text, or it has none

    def __init__(self, path: str | Path | None):
        self.path = path = None if path is None else Path(path)
        self.is_bytes = path is None
        added = {}
        if path is None:
            ranks, end = {bytes([byte]): i for i, byte in enumerate(BYTES)}, 256
        elif path.suffix == ".tiktoken":
            ranks, end = _read_tiktoken(path)
        else:
            if path.is_dir():
                in_one = (path / "tokenizer.json").exists() and not (path / "vocab.json").exists()
                path = path / ("tokenizer.json" if in_one else "vocab.json")
            ranks, end = _read_vocabulary(path)
            added = _read_added(path, len(ranks) + 1)
        self._build(ranks, end, added)

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "BPETokenizer":
        """A new vocabulary of `vocab_size` tokens, the 256 bytes and <|endoftext|> included."""
        ranks = train_bpe(texts, vocab_size)
        tokenizer = cls(None)
        tokenizer.is_bytes = False
        tokenizer._build(ranks, len(ranks), {})
        return tokenizer

    def _build(self, ranks: dict[bytes, int], end: int, added: dict[str, int]) -> None:
        self.encoding = tiktoken.Encoding(
            str(self.path), pat_str=PATTERN, mergeable_ranks=ranks,
            special_tokens={END: end} | added,
        )  # fmt: skip
        self.ranks, self.added = ranks, added
        longest_first = sorted(added, key=len, reverse=True)
        self.cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        self.vocab_size: int = len(ranks) + 1 + len(added)
        self.bos_id: int = end
        self.eos_id: int = end
        self.pad_id: int = end

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of the text, never the control token for what is only written like it."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("text holds a lone surrogate, no valid Unicode; clean it") from None
        ids = []
        for part in self.cut.split(text) if self.cut else [text]:
            known = self.added.get(part)
            ids += self._encode(part) if known is None else [known]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def _encode(self, text: str) -> list[int]:
        try:
            return self.encoding.encode_ordinary(text)
        except BaseException as error:  # tiktoken's own kind, of a stack that is full
            if type(error).__name__ != "PanicException":
                raise
            raise UserError("text holds white space without end, a million characters and more; "
                            "clean it") from None  # fmt: skip

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of the text and, for each, the index of the character it begins in."""
        ids = self.encode(text)
        return ids, self.encoding.decode_with_offsets(ids)[1] if ids else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; the control token vanishes, and so do ids that only pad the model's
        vocabulary. One token alone may be half a character (U+FFFD): decode the growing sequence
        instead."""
        plain = [i for i in ids if i != self.eos_id and i < self.vocab_size]
        return self.encoding.decode_bytes(plain).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Writes vocab.json, merges.txt and, where there are any, added_tokens.json; nothing if
        every byte is a token."""
        if self.is_bytes:
            return
        vocab = {_letters(token): rank for token, rank in self.ranks.items()}
        write_json(folder / "vocab.json", vocab | {END: self.eos_id}, indent=None)
        pairs = (f"{_letters(a)} {_letters(b)}\n" for a, b in merges(self.ranks))
        with atomic_file(folder / "merges.txt") as temporary:
            temporary.write_text("#version: 0.2\n" + "".join(pairs), "utf-8")
        if self.added:
            write_json(folder / "added_tokens.json", self.added)


def _letters(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def _token(letters: str, path: Path) -> bytes:
    if not all(letter in BYTE_OF for letter in letters):
        raise UserError(f"{path}: {letters!r} is no token in bytes; give GPT-2's own file")
    return bytes(BYTE_OF[letter] for letter in letters)


def _read_vocabulary(path: Path) -> tuple[dict[bytes, int], int]:
    """Ranks and the id of the control token, merges checked against them."""
    if path.name not in ("vocab.json", "merges.txt", "tokenizer.json"):
        raise UserError(f"{path}: no GPT-2 vocabulary; give vocab.json or a .tiktoken file")
    if path.name == "tokenizer.json":
        merges_path = path
        vocab, pairs = _read_tokenizer_json(path)
    else:
        path, merges_path = path.with_name("vocab.json"), path.with_name("merges.txt")
        vocab = read_json(path)
        lines = [line for line in read_text(merges_path).split("\n") if line.strip()]
        lines = lines[1:] if lines and lines[0].startswith("#version") else lines
        pairs = [tuple(line.strip("\r").split(" ")) for line in lines]
    is_plain = isinstance(vocab, dict) and sorted(
        i if type(i) is int else -1 for i in vocab.values()
    ) == list(range(len(vocab)))
    if not is_plain or END not in vocab:
        raise UserError(
            f"{path}: not every token its own id from 0 on, or no {END}; give GPT-2's own file"
        )
    end = vocab.pop(END)
    ranks = {_token(letters, path): i for letters, i in sorted(vocab.items(), key=lambda t: t[1])}
    merged = [_token("".join(pair), merges_path) for pair in pairs]
    longer = [token for token in ranks if len(token) > 1]
    sound = all(len(pair) == 2 and vocab.keys() >= set(pair) for pair in pairs)
    if not sound or merged != longer or len(ranks) - len(longer) != 256:
        raise UserError(
            f"{merges_path}: does not make the tokens of {path.name}, in their order, from 256 "
            "bytes; download both files again"
        )
    return ranks, end


def _read_added(path: Path, n_known: int) -> dict[str, int]:
    """Tokens added to a vocabulary of n_known, by their text: of added_tokens.json and of
    tokenizer.json. Errors: UserError unless their ids follow on."""
    beside, whole = path.with_name("added_tokens.json"), path.with_name("tokenizer.json")
    path, listed = (whole, _check_plain(whole)) if whole.exists() else (path, [])
    if beside.exists():
        path, tokens = beside, read_json(beside)
        listed += tokens.items() if isinstance(tokens, dict) else [(None, None)]
    sound = all(
        isinstance(text, str) and text.encode("utf-8", "ignore").decode() == text != ""
        and type(i) is int for text, i in listed
    )  # fmt: skip
    found = {text: i for text, i in listed if i >= n_known} if sound else {}
    if not sound or sorted(found.values()) != list(range(n_known, n_known + len(found))):
        raise UserError(f"{path}: added tokens whose ids do not follow the vocabulary's "
                        f"{n_known}; give the model's own files")  # fmt: skip
    return found


def _check_plain(path: Path) -> list[tuple]:
    """The (text, id) of the tokens added in a tokenizer.json. Errors: UserError if it changes a
    text or cuts it into words otherwise than GPT-2's does."""
    p = Fields(path)
    cut, model = p.table("pre_tokenizer"), p.table("model")
    is_cut_as_here = cut.get("type", "ByteLevel") == "ByteLevel" and cut.get("use_regex", True)
    p.refuse({
        "normalizer": bool(p.get("normalizer")),
        "pre_tokenizer": cut.get("add_prefix_space", False) or not is_cut_as_here,
    }, "GPT-2")  # fmt: skip
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise UserError(f"{path}: marks the ends of words, as GPT-2 does not; not supported")
    tokens = p.get("added_tokens", [])
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise UserError(f"{path}: added_tokens is no list of tokens; download it again")
    return [(token.get("content"), token.get("id")) for token in tokens]


def _read_tokenizer_json(path: Path) -> tuple[dict, list[tuple]]:
    """Vocabulary and merges of the one-file form that transformers 5 writes."""
    content = read_json(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise UserError(f"{path}: no byte-pair encoding; give GPT-2's own file")
    vocab, pairs = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(pairs, list):
        raise UserError(f"{path}: no vocab and merges; download it again")
    added = content.get("added_tokens") or []
    try:
        vocab = vocab | {t["content"]: t["id"] for t in added if t.get("content") == END}
        pairs = [tuple(p.split(" ")) if isinstance(p, str) else tuple(map(str, p)) for p in pairs]
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: malformed added_tokens or merges; download it again") from None
    return vocab, pairs


def _read_tiktoken(path: Path) -> tuple[dict[bytes, int], int]:
    """Ranks from lines of `base64(token) rank`; the control token follows them."""
    ranks = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        token, _, rank = line.partition(" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: no token and rank; download it again") from None
    single = sum(len(token) == 1 for token in ranks)
    if sorted(ranks.values()) != list(range(len(ranks))) or single != 256:
        raise UserError(f"{path}: ranks with gaps, or a byte is missing; download it again")
    return ranks, len(ranks)


def find_vocabulary(folder: Path) -> Path | None:
    """The vocabulary in a model's folder, None if there is none."""
    if any((folder / name).exists() for name in ("vocab.json", "tokenizer.json")):
        return folder
    return next(iter(sorted(folder.glob("*.tiktoken"))), None)
