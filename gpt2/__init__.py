"""GPT-2: the model in OpenAI's names, its tokenizer, and its weight files."""

from gpt2.checkpoint import OFFICIAL, load_gpt2, read_config, save_gpt2
from gpt2.model import GPT2, GPT2Config
from gpt2.tokenizer import GPT2Tokenizer
from minillm.family import Family

FAMILY = Family(
    name="gpt2", bundled="tiny-gpt2", config=GPT2Config, model=GPT2, tokenizer=GPT2Tokenizer,
    load=load_gpt2, save=save_gpt2, targets=("c_attn",),
    official=OFFICIAL, read_config=read_config,
)  # fmt: skip

__all__ = ["GPT2", "GPT2Config", "GPT2Tokenizer", "load_gpt2", "save_gpt2"]
