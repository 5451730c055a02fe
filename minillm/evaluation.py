"""What a model writes for the samples of a task, and how good that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from tqdm import tqdm

from minillm.data.batches import Batches, encode_samples
from minillm.data.samples import Sample, is_bare, shorten
from minillm.data.tasks import Task
from minillm.errors import UserError
from minillm.generate import generate
from minillm.losses import token_loss
from minillm.precision import choose_precision
from minillm.text_metrics import (
    CONVENTION,
    distinct,
    longest_shared,
    mean_with_interval,
    rouge_report,
)
from minillm.training import evaluate


@dataclass(frozen=True)
class Answer:
    """What was written for a sample: its text, whether it ended by itself, its tokens."""

    text: str
    stopped: bool
    n_tokens: int


def answer_room(tokenizer, samples: Sequence[Sample], context: int, wanted: int) -> int:
    """Tokens of an answer, at most those wanted, that even the longest prompt leaves room for, of
    those that cannot be shortened; at least one."""
    whole = (sample.prompt for sample in samples if sample.body is None)
    longest = max((len(tokenizer.encode(prompt, bos=True)) for prompt in whole), default=0)
    return max(1, min(wanted, context - longest))


def write_answers(
    model: nn.Module, tokenizer, samples: Sequence[Sample], max_new_tokens: int,
    max_length: int | None = None, batch_size: int = 32, seed: int = 0, **sampling,
) -> list[Answer]:
    """An answer to each sample, in their order, decoded freely (greedy unless `sampling` says
    otherwise), its end-of-text cut off.

    A prompt's body is shortened until prompt and answer fit in `max_length`; what has no body only
    has to fit in the context. Rows of like length share a batch; that changes no row's answer.
    Errors: UserError naming the sample that does not fit.
    """
    context = model.config.max_seq_len
    room = min(context, max_length or context) - max_new_tokens
    fitting = [shorten(sample, tokenizer, room) for sample in samples]
    _check_bodies(samples, fitting, room, max_new_tokens)
    prompts = [tokenizer.encode(sample.prompt, bos=True) for sample in fitting]
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > context - max_new_tokens:
            raise UserError(
                f"sample {number}: a prompt of {len(prompt)} tokens and an answer of up to "
                f"{max_new_tokens} do not fit in the context of {context}; lower --max-new-tokens "
                "or shorten it"
            )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for start in tqdm(range(0, len(order), batch_size), desc="write", unit="batch", leave=False):
        rows = order[start : start + batch_size]
        written = generate(model, [prompts[i] for i in rows], max_new_tokens,
            eos_id=tokenizer.eos_id, seed=seed + start, **sampling)  # fmt: skip
        for i, tokens in zip(rows, written, strict=True):
            stopped = bool(tokens) and tokens[-1] == tokenizer.eos_id
            text = tokenizer.decode(tokens[:-1] if stopped else tokens)
            answers[i] = Answer(text.strip(), stopped, len(tokens))
    return [answers[i] for i in range(len(samples))]


def _check_bodies(samples, fitting, room: int, max_new_tokens: int) -> None:
    """Errors: UserError if shortening left nothing of any text: all would be asked about none."""
    pairs = zip(samples, fitting, strict=True)
    bare = [is_bare(*pair) for pair in pairs if pair[0].body is not None]
    if bare and all(bare):
        raise UserError(f"an answer of up to {max_new_tokens} tokens leaves {max(0, room)} for the "
                        "prompt, and so nothing of any text; lower --max-new-tokens or raise "
                        "--max-length")  # fmt: skip


def loss_report(
    model: nn.Module, tokenizer, samples: Sequence[Sample], max_length: int, batch_size: int
) -> dict:
    """Loss per response token (EOS included), in nats, and its exponential, of the `loss_n` samples
    that fit.

    Errors: UserError if no sample fits.
    """
    context = model.config.max_seq_len
    encoded = encode_samples(samples, tokenizer, min(max_length, context))
    batches = Batches(encoded.rows, batch_size, tokenizer.pad_id, None, context)
    device = next(model.parameters()).device
    # the weights are in their dtype already: nothing is cast
    loss = evaluate(model, token_loss, batches, choose_precision("fp32", device))
    return {
        "loss": loss, "perplexity": math.exp(min(loss, 700.0)), "loss_n": len(encoded.rows),
        "samples": encoded.summary(),
    }  # fmt: skip


def text_report(
    task: Task, samples: Sequence[Sample], answers: Sequence[Answer], training_text: str | None
) -> dict:
    """ROUGE beside the task's baselines where answers are summaries; how many stopped, how long
    they are, how much they repeat; what they share with `training_text`, if that is given."""
    texts = [answer.text for answer in answers]
    report = {
        "n": len(texts),
        "stopped_share": sum(answer.stopped for answer in answers) / len(texts),
        "mean_tokens": sum(answer.n_tokens for answer in answers) / len(texts),
        "distinct_2": distinct(texts),
    }
    if task.baselines:
        references = [sample.response.strip() for sample in samples]
        report["rouge"] = rouge_report(texts, references)
        report["baselines"] = {
            name: rouge_report([make(sample.row) for sample in samples], references)
            for name, make in task.baselines.items()
        }
        report["convention"] = CONVENTION
    if training_text is not None:
        shared = [longest_shared(text, training_text) for text in texts]
        report["longest_shared"] = max(shared, key=len)
        report["shared_characters"] = mean_with_interval([len(piece) for piece in shared])
    return report
