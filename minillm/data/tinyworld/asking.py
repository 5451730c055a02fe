"""What the kinds of instruction share: the task itself, and how a question or a list is put."""

from typing import NamedTuple

from minillm.data.tinyworld.dice import Dice
from minillm.data.tinyworld.phrases import write


class Task(NamedTuple):
    """One question; `wrong` is an answer of the same shape that is not true."""

    instruction: str
    input: str
    output: str
    wrong: str


def ask(template: str, dice: Dice, **facts) -> str:
    """An instruction, with a question mark only after a question."""
    text = write(template, dice, **facts)
    return text + ("?" if text.startswith(("Wh", "How", "Do ")) else ".")


def ask_about(dice: Dice, asked: str, items: list[str]) -> tuple[str, str]:
    """The list goes into the instruction or, sometimes, into the input."""
    asked = ask(asked, dice)
    if dice.chance(0.9):
        return f"{asked[:-1]}: {', '.join(items)}.", ""
    return asked, ", ".join(items)
