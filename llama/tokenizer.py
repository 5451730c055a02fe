"""LLaMA's tokenizer: SentencePiece, from tokenizer.model or from llama2.c's tokenizer .bin.

A llama2.c file holds pieces and scores of a BPE model; it is turned into the SentencePiece
model that it came from, so that one library does all the encoding.
"""

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llama.llama2c import byte_proto, sentencepiece_proto
from minillm.errors import UserError
from minillm.files import atomic_file, check_readable


class LlamaTokenizer:
    """Text to ids and back, from a file on disk only; path None takes every byte as a token.

    Errors: UserError naming a file that is missing or no tokenizer.
    """

    def __init__(self, path: str | Path | None):
        self.path = path = None if path is None else Path(path)
        self.model_proto = byte_proto() if path is None else _read_proto(path)
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


def _read_proto(path: Path) -> bytes:
    """A SentencePiece model as it is, or made from a llama2.c file."""
    check_readable(path)
    raw = path.read_bytes()
    return sentencepiece_proto(raw, path) if path.suffix == ".bin" else raw
