"""Direct preference optimisation: of two answers, make the better one likelier than it was.

loss = -log sigmoid(r_w - r_l) with the implicit reward r(y) = beta log(pi(y) / pi_ref(y)), whose
gradient is -beta sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)): equation 7 of
Rafailov et al. 2023. The reference pi_ref is the model as it was before.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minillm.adapt.lora import evaluating, lora_layers
from minillm.data.batches import Batches, Row, to_device
from minillm.data.samples import Sample, shorten
from minillm.generate import generate
from minillm.losses import IGNORED, sequence_logprobs
from minillm.precision import Precision


@contextmanager
def without_lora(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its LoRA layers switched off, while it is on."""
    layers = [layer for layer in lora_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


class DPO:
    """The objective, for `train`: batches hold pairs, the better answer in the even rows.

    The reference is the model itself with LoRA switched off; without LoRA, a copy made now (not
    marked as frozen: it has to compute as the model does for both to begin equal). Units:
    log-probabilities of whole answers, EOS included, in nats.
    """

    def __init__(self, model: nn.Module, beta: float):
        self.beta = beta
        has_lora = bool(lora_layers(model))
        self.copy = None if has_lora else copy.deepcopy(model).eval()

    def __call__(self, model: nn.Module, batch: tuple) -> tuple[Tensor, Tensor, dict]:
        """Summed loss, number of pairs, and the sums of `margin` and `accuracy`.

        Shapes: batch = (tokens (2P, T), labels (2P, T), ...), the prompts without labels.
        """
        policy = sequence_logprobs(model, batch)  # (2P,)
        rewards = self.beta * (policy - self.reference_logprobs(model, batch))
        margins = rewards[0::2] - rewards[1::2]  # (P,)
        gained = (margins.detach().sign() + 1) / 2  # a tie, as all are at first, is half right
        told = {"margin": margins.detach().sum(), "accuracy": gained.sum()}
        return -F.logsigmoid(margins).sum(), torch.tensor(len(margins)), told

    @torch.no_grad()
    def reference_logprobs(self, model: nn.Module, batch: tuple) -> Tensor:
        """What the reference gives to the same answers, (2P,)."""
        if self.copy is not None:
            return sequence_logprobs(self.copy, batch)
        with without_lora(model), evaluating(model):
            return sequence_logprobs(model, batch)


@torch.no_grad()
def preference_report(
    model: nn.Module, dpo: DPO, batches: Iterable, precision: Precision
) -> dict[str, float]:
    """Means over pairs: loss, margin, accuracy (how often the better answer gained more), and
    `likelier`, how often it is the likelier one outright; n pairs. Dropout off."""
    sums = dict.fromkeys(("loss", "margin", "accuracy", "likelier"), 0.0)
    n = 0
    for batch in tqdm(batches, desc="preferences", unit="batch", leave=False):
        batch = to_device(batch, precision.device)
        with precision.autocast(), evaluating(model):
            loss, count, told = dpo(model, batch)
            logprobs = sequence_logprobs(model, batch)
        likelier = (logprobs[0::2] > logprobs[1::2]).sum()
        for name, value in {"loss": loss, "likelier": likelier, **told}.items():
            sums[name] += float(value)
        n += int(count)
    return {name: value / n for name, value in sums.items()} | {"n": n}


@torch.no_grad()
def kl_to_reference(
    model: nn.Module, dpo: DPO, tokenizer, samples: list[Sample], max_new_tokens: int, seed: int
) -> tuple[float, float | None]:
    """KL(pi || pi_ref) of whole answers in nats, and its standard error (None of one): the mean of
    log pi(y) - log pi_ref(y) over answers y drawn from pi at temperature 1, one for each sample."""
    room = model.config.max_seq_len - max_new_tokens
    fitting = [shorten(sample, tokenizer, room) for sample in samples]
    prompts = [tokenizer.encode(sample.prompt, bos=True)[:room] for sample in fitting]
    answers = generate(model, prompts, max_new_tokens, temperature=1.0, eos_id=tokenizer.eos_id,
                       seed=seed)  # fmt: skip
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor(prompt + answer)
        labels = tokens.clone()
        labels[: len(prompt)] = IGNORED
        rows.append(Row(tokens, labels))
    device, found = next(model.parameters()).device, []
    with evaluating(model):
        for batch in Batches(rows, 16, tokenizer.pad_id, None, model.config.max_seq_len):
            batch = to_device(batch, device)
            found.append(sequence_logprobs(model, batch) - dpo.reference_logprobs(model, batch))
    gaps = torch.cat(found)
    error = float(gaps.std()) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    return float(gaps.mean()), error
