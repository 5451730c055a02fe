"""LLaMA's tokenizer: SentencePiece, from tokenizer.model; llama2.c's tokenizer.bin and Hugging
Face's tokenizer.json are turned back into the SentencePiece model that they came from (pieces.py).
"""

import io
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from llama.pieces import byte_proto, json_proto, lacks_settings, llama2c_proto, tell_unread
from minillm.errors import UserError
from minillm.files import Fields, atomic_file, check_readable


class LlamaTokenizer:
    """Text to ids and back, from a file on disk (or the one in a folder) only; path None takes
    every byte as a token.

    Errors: UserError naming a file that is missing or no tokenizer.
    """

    def __init__(self, path: str | Path | None):
        path = None if path is None else Path(path)
        if path is not None and path.is_dir():
            path = find_tokenizer(path) or path
        self.path = path
        self.is_bytes = path is None
        self._open(byte_proto() if path is None else _read_proto(path))
        if path is not None and (beside := path.with_name("added_tokens.json")).exists():
            added = Fields(beside).content.items()
            tell_unread(beside, [text for text, i in added
                                 if type(i) is int and i >= self.vocab_size])  # fmt: skip

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "LlamaTokenizer":
        """A new BPE model of `vocab_size` pieces, with byte fallback (any text can be encoded).
        Errors: UserError for a size that the texts do not allow."""
        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size,
                model_type="bpe", byte_fallback=True, character_coverage=1.0, split_digits=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False,
                unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=2, minloglevel=2,
            )  # fmt: skip
        except RuntimeError as error:
            reason = " ".join(str(error).split()).rpartition("] ")[2]
            few = "smaller than required" in reason  # their characters, and the 256 bytes
            what = "too few pieces for these texts" if few else "these texts do not make so many"
            raise UserError(f"--vocab-size {vocab_size}: {what} ({reason[:80]}); "
                            f"{'raise' if few else 'lower'} it") from None  # fmt: skip
        tokenizer = cls(None)
        tokenizer.is_bytes = False
        tokenizer._open(model.getvalue())
        return tokenizer

    def _open(self, model_proto: bytes) -> None:
        self.model_proto = model_proto
        try:
            self.pieces = SentencePieceProcessor(model_proto=model_proto)
        except Exception as error:
            raise UserError(
                f"{self.path}: no SentencePiece model ({' '.join(str(error).split())[:60]}); "
                "give Llama's tokenizer.model or llama2.c's tokenizer.bin"
            ) from None
        # SentencePiece puts a space before every text, unless a model was made without
        self.adds_space: bool = self.pieces.normalize("a") != "a"
        self.vocab_size: int = self.pieces.vocab_size()
        self.bos_id: int = self.pieces.bos_id()
        self.eos_id: int = self.pieces.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{self.path}: no pieces for the beginning and end of a text; give "
                            "Llama's own tokenizer.model")  # fmt: skip
        # Llama has no padding (-1, which no embedding holds): any valid id will do, as paddings
        # are known by their place
        self.pad_id: int = max(self.pieces.pad_id(), 0)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of the text, never a control token for what is only written like one ("<s>")."""
        return [self.bos_id] * bos + self._encode(text) + [self.eos_id] * eos

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of the text and, for each, the index of the character it begins in."""
        found = self._encode(text, return_type="offset_mapping")
        return found["ids"], [start for start, _ in found["offsets"]]

    def _encode(self, text: str, **form):
        try:
            return self.pieces.encode(text, **form)
        except (UnicodeEncodeError, RuntimeError, TypeError):
            raise UserError("text holds a lone surrogate, no valid Unicode; clean it") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens vanish, and so do ids that only pad the model's
        vocabulary. One token alone loses its leading space and may be half a character: decode
        the growing sequence instead."""
        return self.pieces.decode([i for i in ids if i < self.vocab_size])

    def save(self, folder: Path) -> None:
        """Writes tokenizer.model; nothing if every byte is a token."""
        if self.is_bytes:
            return
        with atomic_file(folder / "tokenizer.model") as temporary:
            temporary.write_bytes(self.model_proto)


def find_tokenizer(path: Path) -> Path | None:
    """The tokenizer file of a model: in its folder, or beside it for a single file; None if there
    is none."""
    folder = path if path.is_dir() else path.parent
    for name in ("tokenizer.model", "tokenizer.bin", "tok512.bin", "tokenizer.json"):
        if (folder / name).exists():
            return folder / name
    return None


def _read_proto(path: Path) -> bytes:
    """A SentencePiece model as it is, or made from llama2.c's or Hugging Face's file."""
    check_readable(path)
    if path.suffix == ".json":
        return json_proto(path)
    raw = path.read_bytes()
    if path.suffix == ".bin":
        return llama2c_proto(raw, path)
    if lacks_settings(raw):
        raise UserError(f"{path}: ends before its settings, or has none; download it "
                        "again")  # fmt: skip
    return raw
