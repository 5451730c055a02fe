"""Labels from a language model: by what it writes, and by which label it finds likeliest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from minillm.data.batches import Row, collate
from minillm.data.samples import Sample
from minillm.errors import UserError
from minillm.generate import generate
from minillm.losses import IGNORED, sequence_logprobs
from minillm.metrics import NONE

GENERATION, LIKELIHOOD = "generation", "likelihood"


@dataclass(frozen=True)
class Prediction:
    """A label's index (NONE if the answer is no label), and the answer: the text written, or the
    log-probability of each label."""

    label: int
    answer: str | list[float]


def predict_labels(
    model: nn.Module,
    tokenizer,
    samples: Sequence[Sample],
    labels: Sequence[str],
    by: str = GENERATION,
    batch_size: int = 32,
    max_new_tokens: int = 5,
    seed: int = 0,
    **sampling,
) -> list[Prediction]:
    """What the model takes each sample's label to be, in the samples' order.

    By generation: the text after the prompt must be a label and nothing else (case and spaces
    aside), else NONE. By likelihood: the label with the highest log-probability after the prompt.
    Rows of like length share a batch; that changes no row's answer. `sampling` goes to generate
    (greedy by default). Errors: UserError for a `by` that is neither, or a prompt too long.
    """
    if by not in (GENERATION, LIKELIHOOD):
        raise UserError(f"by {by!r}: choose {GENERATION} or {LIKELIHOOD}")
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt))
    predicted: dict[int, Prediction] = {}
    batches = range(0, len(order), batch_size)
    for start in tqdm(batches, desc=f"predict by {by}", unit="batch", leave=False):
        rows = order[start : start + batch_size]
        prompts = [samples[i].prompt for i in rows]
        if by == GENERATION:
            encoded = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
            new = generate(model, encoded, max_new_tokens, eos_id=tokenizer.eos_id, seed=seed,
                **sampling)  # fmt: skip
            found = [read_label(tokenizer.decode(tokens), labels) for tokens in new]
        else:
            found = _likeliest(model, tokenizer, prompts, labels)
        predicted |= zip(rows, found, strict=True)
    return [predicted[i] for i in range(len(samples))]


def read_label(text: str, labels: Sequence[str]) -> Prediction:
    """The label that a text is, NONE if it is anything else."""
    word = text.strip().lower()
    return Prediction(labels.index(word) if word in labels else NONE, text)


@torch.no_grad()
def _likeliest(model, tokenizer, prompts: list[str], labels: Sequence[str]) -> list[Prediction]:
    """Each prompt's likeliest label, by the summed log-probability of the label's tokens."""
    rows = [label_row(tokenizer, prompt, label) for prompt in prompts for label in labels]
    longest = max(len(row.tokens) for row in rows)
    if longest > model.config.max_seq_len:
        raise UserError(f"a prompt of {longest} tokens exceeds the context; shorten the template")
    was_training = model.training
    model.eval()
    batch = collate(rows, tokenizer.pad_id, model.config.max_seq_len)
    device = next(model.parameters()).device
    scores = sequence_logprobs(model, [tensor.to(device) for tensor in batch])
    model.train(was_training)
    scores = scores.view(len(prompts), len(labels))
    return [Prediction(int(row.argmax()), row.tolist()) for row in scores]


def label_row(tokenizer, prompt: str, label: str) -> Row:
    """BOS + prompt + label as tokens, the label's own as labels. The joined text is encoded, for a
    token may straddle the border, and split by offset: a token that reaches into the label counts.
    """
    text = f"{prompt} {label}"
    ids, starts = tokenizer.encode_with_offsets(text)
    ends = [*starts[1:], len(text)]
    tokens = torch.tensor([tokenizer.bos_id, *ids])
    is_label = torch.tensor([False, *(end > len(prompt) for end in ends)])
    return Row(tokens, torch.where(is_label, tokens, IGNORED))


def correct_ones(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> Iterator[bool]:
    """Whether each prediction is its sample's label."""
    return (p.label == s.label for p, s in zip(predictions, samples, strict=True))
