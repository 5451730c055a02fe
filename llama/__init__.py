"""LLaMA-2: the model in Meta's names, its tokenizer, and its weight files."""

from llama.checkpoint import OFFICIAL, load_llama, read_config, save_llama
from llama.model import Llama, LlamaConfig
from llama.tokenizer import LlamaTokenizer
from minillm.family import Family

FAMILY = Family(
    "llama", "tiny-llama", LlamaConfig, Llama, LlamaTokenizer, load_llama, save_llama,
    LlamaTokenizer.train, ("wq", "wv"), OFFICIAL, read_config,
)  # fmt: skip

__all__ = ["Llama", "LlamaConfig", "LlamaTokenizer", "load_llama", "save_llama"]
