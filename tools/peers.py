"""The other side of tools/benchmark.py: transformers and PEFT, used as their manuals say, in the
same plain loop. The only file outside the tests that imports them."""

import os
import time
from collections.abc import Sequence

import peft
import torch
import torch.nn.functional as F
import transformers
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # now, not when memory is measured
from torch import nn

from minillm.data.batches import Row
from minillm.linear import round_up
from minillm.losses import IGNORED
from minillm.precision import choose_precision
from tools.engines import Setup

# what minillm chose for PyTorch where it was imported; here PyTorch is as it comes
os.environ.pop("LRU_CACHE_CAPACITY", None)
torch.backends.cuda.enable_cudnn_sdp(True)

PEFT_NAMES = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
              "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # fmt: skip


class Clock(transformers.generation.streamers.BaseStreamer):
    """Notes when each token comes out of transformers' generate()."""

    def __init__(self):
        self.marks: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with every token."""
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last one."""


class Peers:
    """The same calls as tools.engines.Ours."""

    def __init__(self, setup: Setup):
        transformers.logging.set_verbosity_error()
        self.setup = setup
        self.device = torch.device(setup.device)
        self.precision = choose_precision(setup.dtype, self.device)
        config = transformers.AutoConfig.from_pretrained(setup.folder)
        config.num_hidden_layers = setup.layers or config.num_hidden_layers
        for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, 0.0)  # as in minillm: the same work and the same loss
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            setup.folder, config=config, dtype=self.precision.dtype
        ).to(self.device).eval()  # fmt: skip
        self.model.generation_config.eos_token_id = None  # every answer has the same length
        self.optimizer = None

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """(T, V) fp32 on the CPU."""
        with torch.no_grad():
            out = self.model(torch.tensor([tokens], device=self.device))
        return out.logits[0].float().cpu()

    def decode(self, prompt: list[int], n_new: int, use_cache: bool) -> list[float]:
        """Seconds of each greedy step, the first of which is the prefill."""
        ids, clock = torch.tensor([prompt], device=self.device), Clock()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n_new,
            use_cache=use_cache, streamer=clock, pad_token_id=0,
        )  # fmt: skip
        return [b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False)]

    def prepare_training(self) -> None:
        """LoRA by PEFT, its own factors in fp32; fused AdamW."""
        s = self.setup
        config = peft.LoraConfig(
            r=s.rank, lora_alpha=s.alpha, lora_dropout=s.lora_dropout, task_type="CAUSAL_LM",
            target_modules=[PEFT_NAMES.get(name, name) for name in s.targets],
        )  # fmt: skip
        if s.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = peft.get_peft_model(self.model, config).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def train_step(self, rows: Sequence[Row]) -> float:
        """Seconds of one optimizer step, `setup.batch_size` rows a forward: autocast where the
        weights are in 16 bits, backward, clip, step. Rows are cut, padded and weighed as
        minillm's are."""
        trained = self.optimizer.param_groups[0]["params"]
        began = time.perf_counter()
        count = sum(row.n_labels for row in rows)
        for some in self._forwards(rows):
            self._loss(some, count).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    @torch.no_grad()
    def loss(self, rows: Sequence[Row]) -> float:
        """Mean over the labels, dropout off."""
        self.model.eval()
        count = sum(row.n_labels for row in rows)
        total = sum(float(self._loss(some, count)) for some in self._forwards(rows))
        self.model.train()
        return total

    def _forwards(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        n = self.setup.batch_size
        return [rows[i : i + n] for i in range(0, len(rows), n)]

    def _loss(self, rows: Sequence[Row], count: int) -> torch.Tensor:
        longest = round_up(max(len(row.tokens) for row in rows) - 1)
        fillers = [longest - len(row.tokens) + 1 for row in rows]  # behind: no token sees them
        tokens = torch.stack([F.pad(row.tokens[:-1], (0, n))
                              for row, n in zip(rows, fillers, strict=True)])  # fmt: skip
        labels = torch.stack([F.pad(row.labels[1:], (0, n), value=IGNORED)
                              for row, n in zip(rows, fillers, strict=True)])  # fmt: skip
        tokens, labels = tokens.to(self.device), labels.to(self.device)  # (B, T)
        with self.precision.autocast():
            return self.model(
                input_ids=tokens, labels=labels, shift_labels=labels, num_items_in_batch=count,
                use_cache=False,
            ).loss  # fmt: skip
