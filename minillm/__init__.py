"""minillm, an LLM engine to learn from and to fine-tune with; the models are in rooms beside it."""

from minillm.adapt.lora import LoRALinear, add_lora, lora_state_dict, mark_only_lora_as_trainable
from minillm.beam import beam_search
from minillm.cache import KVCache
from minillm.generate import generate

__all__ = [
    "KVCache",
    "LoRALinear",
    "add_lora",
    "beam_search",
    "generate",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]
