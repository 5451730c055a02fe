"""Tokens to text as they come: no half characters, and an end at stop strings."""

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.errors import UserError


@dataclass(frozen=True)
class StopStrings:
    """Texts at which a generation ends, wherever the borders of tokens lie.

    The decoded text is searched, not a count of what has matched so far: after "1 1 1" the stop
    string "1 1 2" is one character away, though its first try failed. Errors: UserError for an
    empty text.
    """

    tokenizer: object
    strings: tuple[str, ...]

    def __post_init__(self):
        if "" in self.strings:
            raise UserError("stop string '': every text holds it; leave it out")

    def ends(self, prompt: Sequence[int], new: Sequence[int]) -> bool:
        """Whether what follows the prompt holds one of them."""
        start = len(self.tokenizer.decode(list(prompt)))
        text = self.tokenizer.decode([*prompt, *new])[start:]
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first of them."""
        found = [text.find(string) for string in self.strings]
        return text[: min((at for at in found if at >= 0), default=None)]

    def certain(self, text: str) -> str:
        """The text but for an end that may turn out to begin one of them."""
        ends = (len(text) - n for s in self.strings for n in range(1, len(s))
                if text.endswith(s[:n]))  # fmt: skip
        return text[: min(ends, default=None)]


class TextStream:
    """Turns tokens into text as they come, holding back bytes that are not yet a character and
    characters that may yet be a stop string; nothing is shown from a stop string on."""

    def __init__(self, tokenizer, prompt: list[int], stop: StopStrings | None = None):
        self.tokenizer = tokenizer
        self.stop = stop or StopStrings(tokenizer, ())
        self.tokens = list(prompt)
        self.start = len(tokenizer.decode(self.tokens))
        self.shown = 0

    def push(self, token: int) -> str:
        """The text that one more token makes certain: perhaps none, perhaps several characters."""
        self.tokens.append(token)
        whole = self._decoded()
        text = self.stop.cut(whole)
        if text == whole:  # an unfinished character decodes to U+FFFD until its last byte is there
            text = self.stop.certain(text.rstrip("\ufffd"))
        return self._show(text)

    def finish(self) -> str:
        """What is left, broken bytes included."""
        return self._show(self.text())

    @property
    def at_stop(self) -> bool:
        """Whether a stop string has come."""
        return self.text() != self._decoded()

    def text(self) -> str:
        """Everything after the prompt."""
        return self.stop.cut(self._decoded())

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.tokens)[self.start :]

    def _show(self, text: str) -> str:
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new
