"""LLaMA-2: the model in Meta's names, its tokenizer, and its weight files."""

from llama.checkpoint import OFFICIAL, load_llama, read_config, save_llama
from llama.model import Llama, LlamaConfig
from llama.tokenizer import LlamaTokenizer
from minillm.family import Family

FAMILY = Family(
    name="llama", bundled="tiny-llama", config=LlamaConfig, model=Llama, tokenizer=LlamaTokenizer,
    load=load_llama, save=save_llama, targets=("wq", "wv"),
    official=OFFICIAL, read_config=read_config,
)  # fmt: skip

__all__ = ["Llama", "LlamaConfig", "LlamaTokenizer", "load_llama", "save_llama"]
