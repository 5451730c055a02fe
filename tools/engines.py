"""Our side of tools/benchmark.py: what is timed, and how. The other side is peers.py, match.py lets
them take turns."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minillm.adapt.methods import MethodOptions, adapt
from minillm.data.batches import Batches, Row
from minillm.flops import training_flops
from minillm.generate import generate_steps
from minillm.losses import token_loss
from minillm.precision import choose_precision
from minillm.sampling import Sampling
from minillm.training import TrainSettings, evaluate, train
from tools.models import family_of


@dataclass(frozen=True)
class Setup:
    """What both engines are given: a Hugging Face folder, dtype, device, and LoRA for training."""

    folder: Path
    layers: int | None
    dtype: str  # fp32, bf16 or fp16, of weights and products
    device: str
    targets: tuple[str, ...]  # LoRA's, in our names; peers translate them
    rank: int = 16
    alpha: float = 32
    lora_dropout: float = 0.05
    gradient_checkpointing: bool = False
    batch_size: int = 1  # training: rows of a forward
    pack: int | None = None  # minillm's training: tokens of a forward


class Ours:
    """This project's own models and loop."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.device = torch.device(setup.device)
        self.precision = choose_precision(setup.dtype, self.device)
        family = family_of(setup.folder)
        self.model, self.tokenizer = family.load(
            setup.folder, setup.layers, self.precision.dtype, self.device
        )
        self.model.eval()
        self.model.gradient_checkpointing = setup.gradient_checkpointing

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """(T, V) fp32 on the CPU: to see that both engines are the same model."""
        with torch.no_grad():
            return self.model(torch.tensor([tokens], device=self.device))[0].float().cpu()

    def decode(self, prompt: list[int], n_new: int, use_cache: bool) -> list[float]:
        """Seconds of each greedy step, the first of which is the prefill."""
        steps = generate_steps(self.model, [prompt], n_new, Sampling(), use_cache)
        marks = [time.perf_counter()]
        for _ in steps:
            marks.append(time.perf_counter())
        return [b - a for a, b in zip(marks, marks[1:], strict=False)]

    def prepare_training(self) -> None:
        """LoRA on the targets; dropout on."""
        s = self.setup
        self.model.train()  # LoRA added in eval mode would be merged at once
        options = MethodOptions(
            rank=s.rank, alpha=s.alpha, lora_dropout=s.lora_dropout, targets=s.targets
        )
        self.model, _ = adapt(self.model, self.tokenizer, "lora", options)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # AdamW's moments: train() makes them anew in every call, here they stay as in a long run
        self.moments = [torch.ones_like(p) for p in trained for _ in range(2)]

    def train_step(self, rows: Sequence[Row]) -> float:
        """Seconds of one optimizer step; `setup` says how many rows make a forward."""
        batches = self._batches(rows)
        settings = TrainSettings(accumulation_steps=-(-len(rows) // self.setup.batch_size))
        began = time.perf_counter()
        train(self.model, token_loss, batches, None, settings, self.precision)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def loss(self, rows: Sequence[Row]) -> float:
        """Mean over the labels, dropout off."""
        return evaluate(self.model, token_loss, self._batches(rows), self.precision)

    def _batches(self, rows: Sequence[Row]) -> Batches:
        s, context = self.setup, self.model.config.max_seq_len
        return Batches(rows, s.batch_size, 0, None, context, s.pack)

    def facts(self) -> tuple[int, int]:
        """Vocabulary and context of the model."""
        return self.model.config.vocab_size, self.model.config.max_seq_len

    def decode_bytes(self, n_columns: int) -> int:
        """What writing one token has to read: every weight but embeddings' rows, and the cache."""
        read = sum(_nbytes(block) for block in self.model.blocks)
        read += self.model.vocabulary_head.weight.nbytes
        return read + self.model.new_cache(1, n_columns).nbytes

    def prefill_flops(self, n_tokens: int) -> float:
        """Products with weights, of n tokens and one row of logits."""
        matrices = sum(p.numel() for p in self.model.blocks.parameters() if p.dim() == 2)
        return 2.0 * (n_tokens * matrices + self.model.vocabulary_head.weight.numel())

    def training_flops(self, rows: Sequence[Row]) -> float:
        """Of one optimizer step over the rows."""
        n_tokens = sum(len(row.tokens) - 1 for row in rows)
        n_labels = sum(row.n_labels for row in rows)
        return training_flops(self.model, n_tokens, n_labels, len(rows))


def _nbytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())
