"""Phi-1.5's tokenizer, CodeGen's (Nijkamp et al. 2022): GPT-2's vocabulary, with runs of spaces and
tabs added to it."""

from minillm.bpe_tokenizer import BPETokenizer as PhiTokenizer

__all__ = ["PhiTokenizer"]
