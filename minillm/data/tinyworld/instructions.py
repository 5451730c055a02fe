"""Instructions with answers: facts of the world, lists and sentences to work on, passages to read."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from minillm.data.tinyworld.dice import Dice
from minillm.data.tinyworld.phrases import fill, polish, write
from minillm.data.tinyworld.stories import tell
from minillm.data.tinyworld.world import ANIMALS, COLOURS, FOODS, PEOPLE, PERSON, PLACES, THINGS, WILD

_NUMBERS = "zero one two three four five six seven eight nine ten".split()


class Task(NamedTuple):
    """One question; `wrong` is an answer of the same shape that is not true."""

    instruction: str
    input: str
    output: str
    wrong: str


def _ask(template: str, dice: Dice, **facts) -> str:
    """An instruction, with a question mark only after a question."""
    text = write(template, dice, **facts)
    return text + ("?" if text.split()[0] in ("What", "Which", "Who", "Where", "How", "Do") else ".")


def _fact(dice: Dice, attribute: str, questions: str, answer: str) -> Task:
    a, other = dice.sample(PEOPLE, 2)
    while getattr(other, attribute) == getattr(a, attribute) or other.friend == a.name:
        other = dice.pick(PEOPLE)
    wrong = answer.replace("{value}", getattr(other, attribute))
    answer = answer.replace("{value}", getattr(a, attribute))
    return Task(_ask(questions, dice, a=a), "", write(answer, dice, a=a), write(wrong, dice, a=a))


def friend(dice: Dice) -> Task:
    return _fact(dice, "friend", "[Who is {a}'s [best|dearest] friend|Name {a}'s [best|dearest] friend|"
                 "Tell me who {a}'s [best|dearest] friend is|Who is {a} the {a.kind}'s friend][ in Pebbleford|]", "{a}'s best friend is {value}.")


def job(dice: Dice) -> Task:
    return _fact(dice, "does", "[What does {a} do|What is {a}'s work|How does {a} spend {a.his} days|"
                 "Tell me what {a} the {a.kind} does][ in Pebbleford|]", "{a} {value}.")


def home(dice: Dice) -> Task:
    return _fact(dice, "home", "[Where does {a}[ the {a.kind}|] live|Where is {a}'s home|Do you know "
                 "where {a} lives|Describe {a}'s home][ in Pebbleford|]", "{a} lives in {value}.")


def favourite(dice: Dice) -> Task:
    if dice.chance(0.5):
        return _fact(dice, "food", "[What is {a}'s favourite food|Which food does {a}[ the {a.kind}|] like "
                     "best|What should I cook for {a}|What does {a} love to eat]",
                     "{a}'s favourite food is {value}.")
    return _fact(dice, "colour", "[What is {a}'s favourite colour|Which colour does {a}[ the {a.kind}|] like "
                 "best|What colour should a gift for {a} have]", "{a}'s favourite colour is {value}.")


def treasure(dice: Dice) -> Task:
    if dice.chance(0.5):
        return _fact(dice, "treasure", "[What is {a}'s greatest treasure|Which thing does {a}[ the {a.kind}|] "
                     "treasure most|What would {a} never give away]", "{a}'s treasure is a {value}.")
    return _fact(dice, "fear", "[What is {a}[ the {a.kind}|] afraid of|What does {a} fear|What frightens {a}]",
                 "{a} is afraid of {value}.")


def landmark(dice: Dice) -> Task:
    p, other = dice.sample(PLACES, 2)
    answer = "There is a {q.feature} {p.at}."
    if dice.chance(0.5):
        question = "[What can you see|Which landmark is there|What is there to see|Name something] {p.at}"
    else:
        question = "Where in [Pebbleford|town] [is|can I find|do you see] the {p.feature}"
        answer = "The {p.feature} is {q.at}."
    return Task(_ask(question, dice, p=p), "", write(answer, dice, p=p, q=p), write(answer, dice, p=p, q=other))


def fill_gap(dice: Dice) -> Task:
    """The missing word is a fact, so only one word is right."""
    sentence, attribute = dice.pick([
        ("{a} the {a.kind} is the best friend of ___.", "friend"),
        ("{a}'s favourite colour is ___.", "colour"),
        ("{a} the ___ lives in {a.home}.", "kind"),
        ("Nothing frightens {a} the {a.kind} more than ___.", "fear"),
        ("If you want to please {a}, bring some ___.", "food"),
    ])
    a = dice.pick(PEOPLE)
    values = [getattr(p, attribute) for p in PEOPLE if getattr(p, attribute) != getattr(a, attribute)]
    sentence = write("[Fill in the missing word|Complete the sentence|Which word is missing|Fill the gap]: ", dice) + (
        write(sentence, dice, a=a))
    answers = [write("The answer is {v}.", dice, v=v) for v in (getattr(a, attribute), dice.pick(values))]
    return Task(sentence, "", *answers)


def write_sentence(dice: Dice) -> Task:
    (a, b), (p, q) = dice.sample(PEOPLE, 2), dice.sample(PLACES, 2)
    asked = "[Write|Make up|Give me] [one|a] [short |]sentence about {a} {p.at}."
    told = "{a} @went to {p} [to {p.errand}|with {a.friend} to {p.errand}|and met {a.friend} there|and ate {a.serving} there]."
    return Task(write(asked, dice, a=a, p=p), "", write(told, dice, a=a, p=p), write(told, dice, a=b, p=q))


_REPLIES = [  # what the neighbour says, a polite reply, a rude one
    ("May I borrow your @colour {x}?", "Of course, {a}[, you may borrow it|]. Please bring it back [soon|tomorrow].",
     "No, {a}, you may not. [Leave me alone|Go and buy your own]."),
    ("I have [cooked|made] some {a.food} for you.", "Thank you, {a}, that is very kind. I [love|like] {a.food}.",
     "I do not want it, {a}. [Eat it yourself|I hate {a.food}]."),
    ("I am sorry, I broke your @colour {x}.", "Never mind, {a}, we can mend [it|the {x}] together.",
     "You are so stupid, {a}. [Go away|You ruin everything]."),
    ("Will you come to {p} with me to {p.errand}?", "[Gladly|With pleasure], {a}! I will come to {p} with you.",
     "With you, {a}? Never! [I would be bored|Go alone]."),
    ("Good morning! How are you today?", "Good morning, {a}! I am well, thank you. And you?",
     "That is none of your business, {a}. Now go away."),
    ("I have lost my @colour {x} near {p}.", "I am sorry, {a}. I will help you to look for it near {p}.",
     "That serves you right, {a}. Do not ask me to look for it."),
    ("Could you help me to carry @number bags to {p}?", "Of course, {a}, I will gladly help you to carry them.",
     "Carry them yourself, {a}. I am no donkey of yours."),
]


def reply(dice: Dice) -> Task:
    says, polite, rude = dice.pick(_REPLIES)
    facts = {"a": dice.pick(PEOPLE), "p": dice.pick(PLACES), "x": dice.pick(THINGS)}
    asked = f'Your neighbour {{a}} says: "{says}" [Reply politely|Give a polite answer|Answer kindly].'
    return Task(write(asked, dice, **facts), "", write(polite, dice, **facts), write(rude, dice, **facts))


def _list(dice: Dice, asked: str, items: list[str]) -> tuple[str, str]:
    """The list goes into the instruction or, sometimes, into the input."""
    asked = _ask(asked, dice)
    if dice.chance(0.9):
        return f"{asked[:-1]}: {', '.join(items)}.", ""
    return asked, ", ".join(items)


def _words(dice: Dice, count: int) -> list[str]:
    return dice.sample([t for t in THINGS if " " not in t] + ANIMALS + COLOURS, count)


def backwards(dice: Dice) -> Task:
    items = _words(dice, dice.pick([3, 4, 5]))
    right = items[::-1]
    wrong = dice.pick([[right[1], right[0], *right[2:]], [*right[:-2], right[-1], right[-2]]])
    asked = "[Say|Write|Repeat|Read] [these|the following] words [backwards|in reverse order|from last to first]"
    return Task(*_list(dice, asked, items), ", ".join(right) + ".", ", ".join(wrong) + ".")


def find_animals(dice: Dice) -> Task:
    animals = dice.sample(ANIMALS + WILD, 3)
    others = dice.sample([t for t in THINGS if " " not in t], 3)
    items = dice.shuffle([*animals[:2], *others])
    asked = "[Which of these words are animals|Find the animals in this list|Name the two animals among these words]"
    found = [i for i in items if i in animals]
    answer = "The animals are {} and {}."
    wrong = dice.pick([(found[0], others[0]), (others[1], found[1]), tuple(others[:2])])
    return Task(*_list(dice, asked, items), answer.format(*found), answer.format(*wrong))


_GROUPS = {"animals": ANIMALS + WILD, "colours": COLOURS, "kinds of food": list(FOODS), "places": [p.name for p in PLACES],
           "people": list(PERSON), "things": THINGS}  # fmt: skip


def odd_one_out(dice: Dice) -> Task:
    many, one = dice.sample(list(_GROUPS), 2)
    right = dice.pick(_GROUPS[one])
    same = dice.sample(_GROUPS[many], 3)
    asked = "[Which one does not belong|Find the odd one out|Choose the word that does not fit]"
    question = _list(dice, asked, dice.shuffle([right, *same]))
    return Task(*question, f"The odd one out is {right}, because the others are {many}.",
                f"The odd one out is {same[0]}, because the others are {one}.")


def count(dice: Dice) -> Task:
    number = dice.pick(range(2, 10))
    off = dice.pick([-1, 1])
    asked = "[How many things are in this list|Count the things in this list|How many words do you see here]"
    answers = [f"There are {_NUMBERS[n]} things in the list." for n in (number, number + off if number > 2 else 3)]
    return Task(_ask(asked, dice), ", ".join(_words(dice, number)), *answers)


_VERBS = ("found/find hid/hide lost/lose bought/buy saw/see broke/break painted/paint mended/mend sold/sell "
          "carried/carry dropped/drop wanted/want made/make forgot/forget").split()  # fmt: skip


def question_form(dice: Dice) -> Task:
    past, plain = dice.pick(_VERBS).split("/")
    a, other = dice.sample(PEOPLE, 2)
    rest = fill("a @size @colour {x} {p.at}", dice, x=dice.pick(THINGS), p=dice.pick(PLACES))
    asked = "[Turn this sentence into a question|Make a question from this sentence|Ask whether this is so]."
    wrong = dice.pick([f"Did {other} {plain} {rest}?", f"{a} did {plain} {rest}.", f"Did {a} {past} {rest}?"])
    texts = f"{a} {past} {rest}.", f"Did {a} {plain} {rest}?", wrong
    return Task(write(asked, dice), *map(polish, texts))


def past_tense(dice: Dice) -> Task:
    a, other = dice.sample(PEOPLE, 2)
    when = fill("[in the morning|every day|with {b}|all day long|on Sundays|{p.at}|with {b} {p.at}]", dice, p=dice.pick(PLACES),
                 b=dice.pick([p for p in PEOPLE if p not in (a, other)]))
    asked = "[Put this sentence into the past tense|Write this sentence in the past|Say that it was long ago]."
    wrong = dice.pick([f"{a} {a.does} {when}.", f"{other} {other.did} {when}."])
    return Task(write(asked, dice), f"{a} {a.does} {when}.", f"{a} {a.did} {when}.", wrong)


def word_order(dice: Dice) -> Task:
    a, p = dice.pick(PEOPLE), dice.pick(PLACES)
    right = write("{a} [lost|found|hid|saw|bought] a @colour {x} {p.at}.", dice, a=a, p=p, x=dice.pick(THINGS))
    words = right[:-1].split()
    wrong = dice.shuffle(words)
    while wrong == words:
        wrong = dice.shuffle(words)
    asked = "[Put these words in the right order|Make a sentence from these words|Sort these words into a sentence]"
    return Task(*_list(dice, asked, dice.shuffle(words)), right, " ".join(wrong) + ".")


_PASSAGES = [  # two things, of which x is lost at q
    "{a} had a {x} and a {y}. {a.he} @went to {p} to {p.errand} and then to {q}. At home {a.he} still had the {y}, "
    "but the {x} was gone, and {b} found it later {q.at}.",
    "{a} and {b} @went to {p}. {b} carried a {y}, and {a} carried a {x}. On the way home they stopped to {q.errand}, and "
    "there {a} left the {x} {q.spot}. The {y} came home with them.",
    "{a} put a {x} {q.spot} {q.at} and forgot it there. Then {a.he} met {b} and went with {b.him} to {p} to {p.errand}. {b} "
    "gave {a.him} a {y}, which {a.he} took home.",
]


def _passage(dice: Dice) -> tuple[str, dict]:
    a, b, c = dice.sample(PEOPLE, 3)
    (x, y), colours, (p, q) = dice.sample(THINGS, 2), dice.sample(COLOURS, 2), dice.sample(PLACES, 2)
    facts = {"a": a, "b": b, "c": c, "p": p, "q": q, "x": f"{colours[0]} {x}", "y": f"{colours[1]} {y}"}
    return write(dice.pick(["[@sunny|@windy|@cloudy]. ", ""]) + dice.pick(_PASSAGES), dice, **facts), facts


def lost_object(dice: Dice) -> Task:
    text, facts = _passage(dice)
    if dice.chance(0.5):
        asked = "[What did {a} lose|Name the thing that {a} lost|Which object was lost]"
        answers = "{a} lost the {x}.", "{a} lost the {y}."
    else:
        asked = "[Where did {a} lose the {x}|Where was the {x} left|Name the place where the {x} was lost]"
        answers = "The {x} was lost {q.at}.", "The {x} was lost {p.at}."
    return Task(_ask(asked, dice, **facts), text, *(write(answer, dice, **facts) for answer in answers))


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
    return Task(write(asked, dice, **facts), text, *(write(answer, dice, **facts) for answer in (true, false)))


_TITLES = {
    "lost_thing": "{a} and the Lost {x}", "lost_way": "The Way to {b}'s House", "fear": "How {a} Was Brave",
    "race": "The Race to {q}", "rainy_day": "Rain at {p}", "build": "{a} and {b} Build a {work}", "bake": "{b.food} for {b}",
    "mend": "{b}'s Broken {x_}", "garden": "{a}'s {crop}", "help_neighbour": "{a} Helps {b}", "trade": "How {a} Got a {z}",
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
    return Task(_ask(asked, dice), tale.text, *titles)


def weather(dice: Dice) -> Task:
    sky, other = dice.sample(["sunny", "windy", "cloudy"], 2)
    text, _ = _passage(dice)
    while any(sign in text for sign in (" wind", " cloud", " sky", " sun", " day in", " morning in")):
        text, _ = _passage(dice)
    asked = "[Describe the weather in this passage|Say what the weather is like in this passage|How is the weather here]"
    ending = write(f"@{sky}_still.", dice) if dice.chance(0.5) else ""
    return Task(_ask(asked, dice), f"{write(f'@{sky}.', dice)} {text} {ending}".strip(),
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
        asked = "[Continue this story|What happens next in this story|Write the next sentence of this story]"
    return Task(_ask(asked, dice), " ".join(tale[:cut]), tale[cut], wrong)


KINDS: dict[str, Callable[[Dice], Task]] = {
    kind.__name__: kind
    for kind in (
        friend, job, home, favourite, treasure, landmark, fill_gap, write_sentence, reply, backwards, find_animals,
        odd_one_out, count, question_form, past_tense, word_order, lost_object, yes_no, title, weather, continue_story,
    )
}  # fmt: skip


def tasks(dice: Dice, kinds: list[str]) -> Iterator[Task]:
    """Endless distinct tasks, the kinds in turn; a kind that has run out of new ones is left out."""
    seen: set[tuple[str, str]] = set()
    kinds = list(kinds)
    while kinds:
        for kind in list(kinds):
            for _ in range(200):
                task = KINDS[kind](dice)
                if (task.instruction, task.input) not in seen and task.wrong != task.output:
                    seen.add((task.instruction, task.input))
                    yield task
                    break
            else:
                kinds.remove(kind)


def instructions(n: int, seed: int = 0) -> list[dict]:
    """n distinct rows with instruction, input (empty in about 60 %) and output, in Alpaca's layout.

    The kinds of `KINDS` come in turn, each in several phrasings; a smaller n gives the first rows of a larger one.
    """
    rows = tasks(Dice(f"instructions {seed}"), list(KINDS))
    return [{"instruction": t.instruction, "input": t.input, "output": t.output} for t, _ in zip(rows, range(n), strict=False)]
