"""GPT-2's tokenizer: the engine's byte-level BPE, which other models have as well."""

from minillm.bpe_tokenizer import BPETokenizer as GPT2Tokenizer

__all__ = ["GPT2Tokenizer"]
