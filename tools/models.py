"""What the tools share: the flags that name a model and how to sample, and loading it."""

import time
from pathlib import Path

import torch

from llama import load_llama
from minillm.cli import Parser, add_model_flags, whole
from minillm.data.templates import Template, find_template, template_from
from minillm.errors import UserError
from minillm.peft_format import load_adapter, read_notes
from minillm.precision import DTYPES, choose_device, choose_precision

TINY = Path(__file__).parent.parent / "checkpoints" / "tiny-llama"


def add_adapted_model_flags(parser: Parser) -> None:
    """Which model, and which adapter on top of it."""
    add = add_model_flags(parser).add_argument
    add("--adapter", help="folder of a LoRA adapter to put on top; it knows its base")
    add("--force", action="store_true", help="accept an adapter trained on another base")
    add("--template", help="prompt text (default: the adapter's own; none for a bare model)")
    add("--precision", choices=["auto", *DTYPES],
        help="dtype of the weights (default: fp32 on a CPU, else auto)")  # fmt: skip


def add_sampling_flags(parser: Parser) -> None:
    """How many tokens, and how each is chosen."""
    add = parser.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=whole, default=200)
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, help="draw from the k likeliest tokens")
    add("--top-p", type=float, help="draw from the fewest tokens that reach this probability")
    add("--repetition-penalty", type=float, default=1.0,
        help="above 1 makes tokens seen (prompt included) less likely")  # fmt: skip
    add("--seed", type=whole, default=0)


def load_model(checkpoint, adapter, layers, tokenizer, template, device, precision, force):
    """(model, tokenizer, Template or None) as the flags ask, an adapter's base found by itself.

    Errors: UserError naming the file or flag.
    """
    device = choose_device(device)
    dtype = choose_precision(precision or ("fp32" if device.type == "cpu" else "auto"), device)
    notes = {}
    if adapter is not None:
        notes = read_notes(Path(adapter))
    if checkpoint is None and notes:
        checkpoint, layers = notes.get("base"), layers or notes.get("layers")
        if not isinstance(checkpoint, str) or not Path(checkpoint).exists():
            raise UserError(f"{adapter}: its base {checkpoint!r} is not here; add --checkpoint")
    model, text = load_llama(checkpoint or TINY, layers, dtype.dtype, device, tokenizer)
    if adapter is not None:
        load_adapter(model, adapter, force)
    if template is not None:
        return model.eval(), text, None if template == "none" else find_template(template)
    stored = notes.get("template")
    found = template_from(stored, f"{adapter}/minillm.json") if stored else None
    return model.eval(), text, found


def encode_prompt(tokenizer, template: Template | None, prompt: str, input: str = "") -> list[int]:
    """Prompt ids as in training: the template filled in, or the bare text, after BOS."""
    text = prompt if template is None else template.fill(prompt, input)
    return tokenizer.encode(text, bos=True)


class TextStream:
    """Turns tokens into text as they come, holding back bytes that are not yet a character."""

    def __init__(self, tokenizer, prompt: list[int]):
        self.tokenizer = tokenizer
        self.tokens = list(prompt)
        self.start = len(tokenizer.decode(self.tokens))
        self.shown = self.start

    def push(self, token: int) -> str:
        """The text that one more token makes certain: perhaps none, perhaps several characters."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        # an unfinished character decodes to U+FFFD until its last byte is there
        return self._show(text.rstrip("\ufffd"))

    def finish(self) -> str:
        """What is left, broken bytes included."""
        return self._show(self.tokenizer.decode(self.tokens))

    def text(self) -> str:
        """Everything after the prompt."""
        return self.tokenizer.decode(self.tokens)[self.start :]

    def _show(self, text: str) -> str:
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new


class Stopwatch:
    """Tokens per second of the first step (prefill) and of the others (decode)."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks = [self._now()]
        self.decoded = 0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark(self, n_tokens: int) -> None:
        """Called after every step with the number of rows that got a token."""
        self.marks.append(self._now())
        self.decoded += n_tokens if len(self.marks) > 2 else 0

    def summary(self, n_prompt: int) -> str:
        """One line, from the prompt tokens of all rows and the steps seen."""
        if len(self.marks) < 2:
            return "nothing generated"
        prefill, decode = self.marks[1] - self.marks[0], self.marks[-1] - self.marks[1]
        line = f"prefill {n_prompt} tokens, {n_prompt / prefill:.0f} tokens/s"
        if self.decoded:
            line += f"; decode {self.decoded} tokens, {self.decoded / decode:.0f} tokens/s"
        return line
