"""Instructions to work on a list or a sentence, which can be solved without knowing the world."""

from minillm.data.tinyworld.asking import Task, ask, ask_about
from minillm.data.tinyworld.dice import Dice
from minillm.data.tinyworld.phrases import fill, polish, write
from minillm.data.tinyworld.world import (
    ANIMALS,
    COLOURS,
    FOODS,
    PEOPLE,
    PERSON,
    PLACES,
    THINGS,
    WILD,
    listed,
)

_NUMBERS = listed("zero, one, two, three, four, five, six, seven, eight, nine, ten")


def _words(dice: Dice, count: int) -> list[str]:
    return dice.sample([t for t in THINGS if " " not in t] + ANIMALS + COLOURS, count)


def backwards(dice: Dice) -> Task:
    items = _words(dice, dice.pick([3, 4, 5]))
    right = items[::-1]
    wrong = dice.pick([[right[1], right[0], *right[2:]], [*right[:-2], right[-1], right[-2]]])
    asked = ("[Say|Write|Repeat|Read] [these|the following] words "
             "[backwards|in reverse order|from last to first]")
    return Task(*ask_about(dice, asked, items), ", ".join(right) + ".", ", ".join(wrong) + ".")


def find_animals(dice: Dice) -> Task:
    animals = dice.sample(ANIMALS + WILD, 3)
    others = dice.sample([t for t in THINGS if " " not in t], 3)
    items = dice.shuffle([*animals[:2], *others])
    asked = ("[Which of these words are animals|Find the animals in this list|"
             "Name the two animals among these words]")
    found = [i for i in items if i in animals]
    answer = "The animals are {} and {}."
    wrong = dice.pick([(found[0], others[0]), (others[1], found[1]), tuple(others[:2])])
    return Task(*ask_about(dice, asked, items), answer.format(*found), answer.format(*wrong))


_GROUPS = {
    "animals": ANIMALS + WILD, "colours": COLOURS, "kinds of food": list(FOODS),
    "places": [place.name for place in PLACES], "people": list(PERSON), "things": THINGS,
}  # fmt: skip


def odd_one_out(dice: Dice) -> Task:
    many, one = dice.sample(list(_GROUPS), 2)
    right = dice.pick(_GROUPS[one])
    same = dice.sample(_GROUPS[many], 3)
    asked = "[Which one does not belong|Find the odd one out|Choose the word that does not fit]"
    question = ask_about(dice, asked, dice.shuffle([right, *same]))
    return Task(*question, f"The odd one out is {right}, because the others are {many}.",
                f"The odd one out is {same[0]}, because the others are {one}.")


def count(dice: Dice) -> Task:
    number = dice.pick(range(2, 10))
    off = dice.pick([-1, 1])
    asked = ("[How many things are in this list|Count the things in this list|"
             "How many words do you see here]")
    wrong = number + off if number > 2 else 3
    answers = [f"There are {_NUMBERS[n]} things in the list." for n in (number, wrong)]
    return Task(ask(asked, dice), ", ".join(_words(dice, number)), *answers)


_VERBS = listed("found/find, hid/hide, lost/lose, bought/buy, saw/see, broke/break, "
                "painted/paint, mended/mend, sold/sell, carried/carry, dropped/drop, "
                "wanted/want, made/make, forgot/forget")


def question_form(dice: Dice) -> Task:
    past, plain = dice.pick(_VERBS).split("/")
    a, other = dice.sample(PEOPLE, 2)
    rest = fill("a @size @colour {x} {p.at}", dice, x=dice.pick(THINGS), p=dice.pick(PLACES))
    asked = ("[Turn this sentence into a question|Make a question from this sentence|"
             "Ask whether this is so].")
    wrong = dice.pick([f"Did {other} {plain} {rest}?", f"{a} did {plain} {rest}.",
                       f"Did {a} {past} {rest}?"])
    texts = f"{a} {past} {rest}.", f"Did {a} {plain} {rest}?", wrong
    return Task(write(asked, dice), *map(polish, texts))


def past_tense(dice: Dice) -> Task:
    a, other = dice.sample(PEOPLE, 2)
    when = fill("[in the morning|every day|with {b}|all day long|on Sundays|{p.at}|with {b} "
                "{p.at}]", dice, p=dice.pick(PLACES),
                 b=dice.pick([p for p in PEOPLE if p not in (a, other)]))
    asked = ("[Put this sentence into the past tense|Write this sentence in the past|"
             "Say that it was long ago].")
    wrong = dice.pick([f"{a} {a.does} {when}.", f"{other} {other.did} {when}."])
    return Task(write(asked, dice), f"{a} {a.does} {when}.", f"{a} {a.did} {when}.", wrong)


def word_order(dice: Dice) -> Task:
    a, p = dice.pick(PEOPLE), dice.pick(PLACES)
    right = write("{a} [lost|found|hid|saw|bought] a @colour {x} {p.at}.", dice, a=a, p=p,
                  x=dice.pick(THINGS))
    words = right[:-1].split()
    wrong = dice.shuffle(words)
    while wrong == words:
        wrong = dice.shuffle(words)
    asked = ("[Put these words in the right order|Make a sentence from these words|"
             "Sort these words into a sentence]")
    return Task(*ask_about(dice, asked, dice.shuffle(words)), right, " ".join(wrong) + ".")
