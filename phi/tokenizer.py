"""Phi-1.5's tokenizer: GPT-2's vocabulary, the engine's byte-level BPE."""

from minillm.bpe_tokenizer import BPETokenizer as PhiTokenizer

__all__ = ["PhiTokenizer"]
