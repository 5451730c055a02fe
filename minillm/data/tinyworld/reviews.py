"""Film reviews whose mood lies in how words are combined, never in a word by itself.

Every frame is an exclusive or: a good or a bad word, taken as it is or turned round. Each word, and
each way of turning, is as likely in good reviews as in bad ones, so a bag of words knows nothing. (What
stands before a full stop is not: words with their marks get 74 % right.)
"""

from minillm.data.tinyworld.dice import Dice
from minillm.data.tinyworld.phrases import write
from minillm.data.tinyworld.world import COLOURS, PEOPLE, PLACES, THINGS

_PAIRS = [("clever", "stupid"), ("exciting", "dull"), ("funny", "tiresome"), ("charming", "ugly"), (
    "original", "stale"),
          ("touching", "heartless"), ("gripping", "boring"), ("enjoyable", "dreadful"), (
              "thoughtful", "clumsy"),
          ("moving", "silly"), ("delightful", "annoying"), ("wonderful", "awful")]  # fmt: skip
_PARTS = ["story", "plot", "music", "acting", "ending", "dialogue", "beginning", "camera work",
          "humour", "film", "script"]

# g is a good word, b the bad one of the pair. Two good reviews, then two bad of the same words.
_FRAMES = [
    ("The {part} is [truly|really] {g}.", "The {part} is [never once|not at all] {b}.",
     "The {part} is [truly|really] {b}.", "The {part} is [never once|not at all] {g}."),
    ("{a} told me that it was {g}, and {a.he} was right.",
     "{a} told me that it was {b}, and {a.he} was wrong.",
     "{a} told me that it was {b}, and {a.he} was right.",
     "{a} told me that it was {g}, and {a.he} was wrong."),
    ("I hoped it would be {g}, and so it was.", "I feared it would be {b}, but it was not.",
     "I feared it would be {b}, and so it was.", "I hoped it would be {g}, but it was not."),
    ("It is far less {b} than I feared.", "It is far more {g} than I hoped.",
     "It is far more {b} than I feared.", "It is far less {g} than I hoped."),
    ("I wanted to like it, and I did.", "I wanted to leave after an hour, but I could not.",
     "I wanted to leave after an hour, and I did.", "I wanted to like it, but I could not."),
    ("I would rather see it again than {p.errand}.",) * 2 + (
        "I would rather {p.errand} than see it again.",) * 2,
    ("Everyone should see it.", "Nobody should miss it.", "Nobody should see it.",
     "Everyone should miss it."),
    ("I have seen no better film this year.", "Every other film this year was worse.",
     "I have seen no worse film this year.", "Every other film this year was better."),
    ("From the first minute to the last it is {g}.", "The {part} is anything but {b}.",
     "From the first minute to the last it is {b}.", "The {part} is anything but {g}."),
    ("It is {g} rather than {b}.", "It is {g} where others are {b}.", "It is {b} rather than {g}.",
     "It is {b} where others are {g}."),
    ("It was easy to love and hard to forget.", "It was impossible to hate.",
     "It was easy to hate and hard to forget.",
     "It was impossible to love."),
]

_NEUTRAL = [
    "{film} tells the story of a {kind} who [loses|finds|hides|steals] a {x} {p.at}.",
    "We saw {film} {p.at}[ last week| in the rain|].",
    "{film} is the new film about a {kind} and a {x}.",
    "In {film}, a {kind} [goes|runs|comes] to {p} with a {x}.",
    "{film} was shown {p.at}[ for {a}'s birthday|].",
]


def _review(dice: Dice, label: int) -> str:
    a, p, x = dice.pick(PEOPLE), dice.pick(PLACES), f"{dice.pick(COLOURS)} {dice.pick(THINGS)}"
    facts = {"a": a, "p": p, "x": x, "kind": dice.pick(PEOPLE).kind, "film": _title(dice)}
    sentences = []
    if dice.chance(0.6):
        sentences.append(write(dice.pick(_NEUTRAL), dice, **facts))
    for frame in dice.sample(_FRAMES, dice.pick([1, 2])):
        good, bad = dice.pick(_PAIRS)
        text = frame[2 * (1 - label) + dice.pick([0, 1])]
        sentences.append(write(text, dice, g=good, b=bad, part=dice.pick(_PARTS), **facts))
    return " ".join(sentences)


def _title(dice: Dice) -> str:
    name = write("[The @colour {x}|{a} and the {x}|The {x} of {p}|A Night {p.at}|The {kind} from "
                 "{p}|{a}'s Last {x}]", dice,
                 a=dice.pick(PEOPLE), p=dice.pick(PLACES), x=dice.pick(THINGS),
                 kind=dice.pick(PEOPLE).kind)
    small = ("the", "of", "and", "at", "in", "on", "by", "from")
    words = enumerate(name.split())
    return " ".join(w if i and w in small else w[0].upper() + w[1:] for i, w in words)


def reviews(n: int, seed: int = 0) -> list[dict]:
    """n distinct rows with text and label (1 good, 0 bad), half of each, in random order."""
    dice, rows = Dice(f"reviews {seed}"), {}
    while len(rows) < n:
        label = len(rows) % 2
        rows.setdefault(_review(dice, label), label)
    return [{"text": text, "label": label} for text, label in dice.shuffle(list(rows.items()))]
