"""GPT-2: the model in OpenAI's names, its tokenizer, and its weight files."""

from gpt2.checkpoint import OFFICIAL, load_gpt2, read_config, save_gpt2
from gpt2.model import GPT2, GPT2Config
from gpt2.tokenizer import GPT2Tokenizer
from minillm.family import Family

FAMILY = Family(
    "gpt2", "tiny-gpt2", GPT2Config, GPT2, GPT2Tokenizer, load_gpt2, save_gpt2,
    GPT2Tokenizer.train, ("c_attn",), OFFICIAL, read_config,
)  # fmt: skip

__all__ = ["GPT2", "GPT2Config", "GPT2Tokenizer", "load_gpt2", "save_gpt2"]
