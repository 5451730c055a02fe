"""Labels from a language model: by what it writes, and by which label it finds likeliest."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from minillm.adapt.lora import evaluating
from minillm.data.batches import Row, collate, to_device
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
    Rows of like length share a batch; that changes no row's answer. A prompt that leaves no room
    in the context is NONE, with a warning. `sampling` goes to generate (greedy by default).
    Errors: UserError for a `by` that is neither.
    """
    if by not in (GENERATION, LIKELIHOOD):
        raise UserError(f"by {by!r}: choose {GENERATION} or {LIKELIHOOD}")
    context = model.config.max_seq_len
    prompts = [sample.prompt for sample in samples]
    if by == GENERATION:
        needed = [len(tokenizer.encode(p, bos=True)) + max_new_tokens for p in prompts]
    else:
        needed = [max(len(label_row(tokenizer, p, x).tokens) for x in labels) for p in prompts]
    order = sorted((i for i, n in enumerate(needed) if n <= context), key=needed.__getitem__)
    predicted = dict.fromkeys(range(len(samples)), Prediction(NONE, ""))
    if len(order) < len(samples):
        print(f"warning: {len(samples) - len(order)} prompts do not fit the context of {context} "
              "tokens and count as wrong", file=sys.stderr)  # fmt: skip
    batches = range(0, len(order), batch_size)
    for start in tqdm(batches, desc=f"predict by {by}", unit="batch", leave=False):
        rows = order[start : start + batch_size]
        prompts = [samples[i].prompt for i in rows]
        if by == GENERATION:
            encoded = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
            new = generate(model, encoded, max_new_tokens, eos_id=tokenizer.eos_id,
                seed=seed + start, **sampling)  # fmt: skip
            found = [read_label(tokenizer.decode(tokens), labels) for tokens in new]
        else:
            found = _likeliest(model, tokenizer, prompts, labels)
        predicted |= zip(rows, found, strict=True)
    return [predicted[i] for i in range(len(samples))]


def read_label(text: str, labels: Sequence[str]) -> Prediction:
    """The label that a text is, NONE if it is anything else."""
    word, known = text.strip().lower(), [label.lower() for label in labels]
    return Prediction(known.index(word) if word in known else NONE, text)


@torch.no_grad()
def _likeliest(model, tokenizer, prompts: list[str], labels: Sequence[str]) -> list[Prediction]:
    """Each prompt's likeliest label, by the summed log-probability of the label's tokens."""
    rows = [label_row(tokenizer, prompt, label) for prompt in prompts for label in labels]
    batch = collate(rows, tokenizer.pad_id, model.config.max_seq_len)
    device = next(model.parameters()).device
    with evaluating(model):
        scores = sequence_logprobs(model, to_device(batch, device))
    scores = scores.view(len(prompts), len(labels))
    return [Prediction(int(row.argmax()), row.tolist()) for row in scores]


def label_row(tokenizer, prompt: str, label: str) -> Row:
    """BOS + prompt + label as tokens, the label's own as labels. The joined text is encoded, for a
    token may straddle the border, and split by offset: a token that reaches into the label counts.
    """
    prompt = prompt.rstrip(" ")
    text = f"{prompt} {label}"
    ids, starts = tokenizer.encode_with_offsets(text)
    ends = [*starts[1:], len(text)]
    tokens = torch.tensor([tokenizer.bos_id, *ids])
    is_label = torch.tensor([False, *(end > len(prompt) for end in ends)])
    return Row(tokens, torch.where(is_label, tokens, IGNORED))
