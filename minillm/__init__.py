"""minillm: an LLM engine to learn from and to fine-tune with. Models live in llama/ and gpt2/."""

from minillm.cache import KVCache
from minillm.generate import generate

__all__ = ["KVCache", "generate"]
