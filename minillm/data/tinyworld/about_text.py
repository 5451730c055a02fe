"""Instructions about a given text: what was lost, whether it is so, its title, weather and end."""

from minillm.data.tinyworld.asking import Task, ask
from minillm.data.tinyworld.dice import Dice
from minillm.data.tinyworld.phrases import polish, write
from minillm.data.tinyworld.stories import tell
from minillm.data.tinyworld.world import COLOURS, PEOPLE, PLACES, THINGS

_PASSAGES = [  # two things, of which x is lost at q
    "{a} had a {x} and a {y}. {a.he} @went to {p} to {p.errand} and then to {q}. At home {a.he} "
    "still had the {y}, but the {x} was gone, and {b} found it later {q.at}.",
    "{a} and {b} @went to {p}. {b} carried a {y}, and {a} carried a {x}. On the way home they "
    "stopped to {q.errand}, and there {a} left the {x} {q.spot}. The {y} came home with them.",
    "{a} put a {x} {q.spot} {q.at} and forgot it there. Then {a.he} met {b} and went with "
    "{b.him} to {p} to {p.errand}. {b} gave {a.him} a {y}, which {a.he} took home.",
]


def _passage(dice: Dice, opening: str = "") -> tuple[str, dict]:
    a, b, c = dice.sample(PEOPLE, 3)
    p, q = dice.sample(PLACES, 2)
    things, colours = dice.sample(THINGS, 2), dice.sample(COLOURS, 2)
    x, y = (f"{colour} {thing}" for colour, thing in zip(colours, things, strict=True))
    facts = {"a": a, "b": b, "c": c, "p": p, "q": q, "x": x, "y": y}
    opening = opening or dice.pick(["[@sunny|@windy|@cloudy]. ", ""])
    return write(opening + dice.pick(_PASSAGES), dice, **facts), facts


def lost_object(dice: Dice) -> Task:
    text, facts = _passage(dice)
    if dice.chance(0.5):
        asked = "[What did {a} lose|Name the thing that {a} lost|Which object was lost]"
        answers = "{a} lost the {x}.", "{a} lost the {y}."
    else:
        asked = ("[Where did {a} lose the {x}|Where was the {x} left|"
                 "Name the place where the {x} was lost]")
        answers = "The {x} was lost {q.at}.", "The {x} was lost {p.at}."
    answers = [write(answer, dice, **facts) for answer in answers]
    return Task(ask(asked, dice, **facts), text, *answers)


def yes_no(dice: Dice) -> Task:
    """Yes or no with the reason, which is the true state of things."""
    text, facts = _passage(dice)
    reason = "because {a} lost the {x} {q.at}"
    true, false = f"Yes, {reason}.", f"No, {reason}."
    claim = dice.pick(["{a} lost a {x}", "the {x} was lost {q.at}", "something was lost {q.at}"])
    if dice.chance(0.5):
        claim = dice.pick(["{a} lost a {y}", "the {x} was lost {p.at}", "{c} lost a {x}"])
        true, false = false, true
    asked = f"[Is this true|Does this fit the passage|Yes or no]: {claim}?"
    answers = [write(answer, dice, **facts) for answer in (true, false)]
    return Task(write(asked, dice, **facts), text, *answers)


_TITLES = {
    "lost_thing": "{a} and the Lost {x}", "lost_way": "The Way to {b}'s House", "fear":
        "How {a} Was Brave",
    "race": "The Race to {q}", "rainy_day": "Rain at {p}", "build": "{a} and {b} Build a {work}",
        "bake": "{b.food} for {b}",
    "mend": "{b}'s Broken {x_}", "garden": "{a}'s {crop}", "help_neighbour": "{a} Helps {b}",
        "trade": "How {a} Got a {z}",
    "secret_gift": "A Secret Gift for {b}", "promise": "{a} Keeps a Promise",
}


def _title_case(text: str) -> str:
    small = {"a", "an", "and", "at", "for", "the", "to", "with", "of"}
    words = polish(text).split()
    return " ".join(w if i and w in small else w[0].upper() + w[1:] for i, w in enumerate(words))


def title(dice: Dice) -> Task:
    plot = dice.pick(list(_TITLES))
    tale, other = tell(dice, plot), tell(dice, plot)
    asked = "[Give this story a title|Find a title for this story|What could this story be called]"
    titles = [_title_case(_TITLES[plot].format(**t.facts)) for t in (tale, other)]
    return Task(ask(asked, dice), tale.text, *titles)


def weather(dice: Dice) -> Task:
    sky, other = dice.sample(["sunny", "windy", "cloudy"], 2)
    text, _ = _passage(dice, f"@{sky}. ")
    asked = ("[Describe the weather in this passage|Say what the weather is like in this passage|"
             "How is the weather here]")
    ending = write(f"@{sky}_still.", dice) if dice.chance(0.5) else ""
    return Task(ask(asked, dice), f"{text} {ending}".strip(),
                f"The weather was {sky}.", f"The weather was {other}.")


def continue_story(dice: Dice) -> Task:
    """The next sentences of a story, or its end; wrong is the same place in another story."""
    plot = dice.pick(list(_TITLES))
    tale, other = tell(dice, plot).sentences, tell(dice, plot)
    wrong = dice.pick([line for line in other.sentences if other.facts["a"].name in line])
    if dice.chance(0.4):
        cut = len(tale) - 1
        asked = "[Write the end of this story|How does this story end|Finish this story]"
    else:
        cut = dice.pick(range(3, 7))
        asked = ("[Continue this story|What happens next in this story|"
                 "Write the next sentence of this story]")
    return Task(ask(asked, dice), " ".join(tale[:cut]), tale[cut], wrong)
