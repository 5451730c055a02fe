"""Turns a template into English.

"[a|b]" picks a variant (nested freely), "@name" picks from a word list, "{a.his}" names a fact.
Only variants that are really written are thrown for: no choice is counted that leaves no trace.
"""

import functools
import re

from minillm.data.tinyworld.dice import Dice
from minillm.data.tinyworld.words import LISTS

_TOKEN = re.compile(r"[\[\]|]|@\w+|[^\[\]|@]+")
_ARTICLE = re.compile(r"\b([Aa]) (?=(?!one|use|uni|eu)[aeiou])")
_START = re.compile(r"(?:^|(?<=[.!?]\s)|(?<=[.!?]\s\"))\"?[a-z]")


@functools.cache
def parse(template: str) -> tuple:
    """A tuple of strings and lists; a list holds the parsed variants of one choice."""
    stack: list[list] = [[[]]]  # open choices, each a list of variants; the last variant is growing
    for token in _TOKEN.findall(template):
        if token == "[":
            stack.append([[]])
        elif token == "|" and len(stack) > 1:
            stack[-1].append([])
        elif token == "]":
            choice = [tuple(variant) for variant in stack.pop()]
            stack[-1][-1].append(choice)
        elif token[0] == "@":
            stack[-1][-1].append([parse(line) for line in LISTS[token[1:]]])
        else:
            stack[-1][-1].append(token)
    assert len(stack) == 1, f"unbalanced brackets in {template!r}"
    return tuple(stack[0][0])


def expand(parts: tuple, dice: Dice) -> str:
    """Throws the dice for every choice on the way and joins what was picked."""
    return "".join(p if isinstance(p, str) else expand(dice.pick(p), dice) for p in parts)


def polish(text: str) -> str:
    """Puts "an" before vowels and a capital at the start of every sentence."""
    text = _ARTICLE.sub(r"\1n ", text.replace("..", "."))
    return _START.sub(lambda match: match.group().upper(), text)


def fill(template: str, dice: Dice, **facts) -> str:
    """A fragment of text from a template; `facts` are what the braces may name."""
    return expand(parse(template), dice).format(**facts)


def write(template: str, dice: Dice, **facts) -> str:
    """One polished text from a template."""
    return polish(fill(template, dice, **facts))
