"""Hashes that tell whether an adapter meets the weights and the tokenizer it was trained with."""

import hashlib
import json
from collections.abc import Container

import torch
from torch import nn

from minillm.adapt.lora_linear import LORA


def fingerprint(model: nn.Module, without: Container[str] = ()) -> dict[str, str]:
    """A hash of the base's weights as they would be in bf16 and in fp16.

    Two hashes, because the same file may be held in fp32, bf16 or fp16 when an adapter is trained
    and when it is loaded. One of the two agrees in every such case but one: an fp32 file held in
    bf16 here and in fp16 there, which has been rounded to two different bases. LoRA and the
    tensors named in `without` (what a method trains) are left out. Every value enters a sum,
    every 997th also the hash itself, which sees their order.
    """
    hashes = {"bfloat16": hashlib.sha256(), "float16": hashlib.sha256()}
    for name, value in sorted(model.state_dict().items()):
        if name.endswith(LORA) or name in without:
            continue
        for dtype, running in hashes.items():
            bits = value.detach().to(getattr(torch, dtype)).view(torch.int16).flatten()
            total = int(bits.sum(dtype=torch.int64))
            sample = bits[::997].cpu().numpy().tobytes()
            running.update(json.dumps([name, list(value.shape), total]).encode() + sample)
    return {dtype: running.hexdigest() for dtype, running in hashes.items()}


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of what each id stands for, and of which ids begin and end a text."""
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    ends = [tokenizer.bos_id, tokenizer.eos_id]
    return hashlib.sha256(json.dumps([texts, ends]).encode()).hexdigest()
