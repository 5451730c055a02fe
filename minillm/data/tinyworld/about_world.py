"""Instructions whose answers are facts of the world, or a friendly sentence about it."""

from minillm.data.tinyworld.asking import Task, ask
from minillm.data.tinyworld.dice import Dice
from minillm.data.tinyworld.phrases import write
from minillm.data.tinyworld.world import PEOPLE, PLACES, THINGS


def _fact(dice: Dice, attribute: str, questions: str, answer: str) -> Task:
    a, other = dice.sample(PEOPLE, 2)
    while getattr(other, attribute) == getattr(a, attribute) or other.friend == a.name:
        other = dice.pick(PEOPLE)
    wrong = answer.replace("{value}", getattr(other, attribute))
    answer = answer.replace("{value}", getattr(a, attribute))
    return Task(ask(questions, dice, a=a), "", write(answer, dice, a=a), write(wrong, dice, a=a))


def friend(dice: Dice) -> Task:
    return _fact(dice, "friend",
                 "[Who is {a}'s [best|dearest] friend|Name {a}'s [best|dearest] friend|Tell me "
                 "who {a}'s [best|dearest] friend is|Who is {a} the {a.kind}'s friend][ in "
                 "Pebbleford|]", "{a}'s best friend is {value}.")


def job(dice: Dice) -> Task:
    return _fact(dice, "does",
                 "[What does {a} do|What is {a}'s work|How does {a} spend {a.his} days|Tell me "
                 "what {a} the {a.kind} does][ in Pebbleford|]", "{a} {value}.")


def home(dice: Dice) -> Task:
    return _fact(dice, "home",
                 "[Where does {a}[ the {a.kind}|] live|Where is {a}'s home|Do you know where {a} "
                 "lives|Describe {a}'s home][ in Pebbleford|]", "{a} lives in {value}.")


def favourite(dice: Dice) -> Task:
    if dice.chance(0.5):
        return _fact(dice, "food",
                     "[What is {a}'s favourite food|Which food does {a}[ the {a.kind}|] like "
                     "best|What should I cook for {a}|What does {a} love to eat]",
                     "{a}'s favourite food is {value}.")
    return _fact(dice, "colour",
                 "[What is {a}'s favourite colour|Which colour does {a}[ the {a.kind}|] like "
                 "best|What colour should a gift for {a} have]",
                 "{a}'s favourite colour is {value}.")


def treasure(dice: Dice) -> Task:
    if dice.chance(0.5):
        return _fact(dice, "treasure",
                     "[What is {a}'s greatest treasure|Which thing does {a}[ the {a.kind}|] "
                     "treasure most|What would {a} never give away]",
                 "{a}'s treasure is a {value}.")
    return _fact(dice, "fear",
                 "[What is {a}[ the {a.kind}|] afraid of|What does {a} fear|What frightens {a}]",
                 "{a} is afraid of {value}.")


def landmark(dice: Dice) -> Task:
    p, other = dice.sample(PLACES, 2)
    answer = "There is a {q.feature} {p.at}."
    if dice.chance(0.5):
        question = ("[What can you see|Which landmark is there|What is there to see|"
                    "Name something] {p.at}")
    else:
        question = "Where in [Pebbleford|town] [is|can I find|do you see] the {p.feature}"
        answer = "The {p.feature} is {q.at}."
    answers = [write(answer, dice, p=p, q=place) for place in (p, other)]
    return Task(ask(question, dice, p=p), "", *answers)


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
    value = getattr(a, attribute)
    others = [getattr(p, attribute) for p in PEOPLE if getattr(p, attribute) != value]
    sentence = write("[Fill in the missing word|Complete the sentence|Which word is missing|Fill "
                     "the gap]: ", dice) + (
        write(sentence, dice, a=a))
    answers = [write("The answer is {v}.", dice, v=v) for v in (value, dice.pick(others))]
    return Task(sentence, "", *answers)


def write_sentence(dice: Dice) -> Task:
    (a, b), (p, q) = dice.sample(PEOPLE, 2), dice.sample(PLACES, 2)
    asked = "[Write|Make up|Give me] [one|a] [short |]sentence about {a} {p.at}."
    told = ("{a} @went to {p} [to {p.errand}|with {a.friend} to {p.errand}|"
            "and met {a.friend} there|and ate {a.serving} there].")
    answers = write(told, dice, a=a, p=p), write(told, dice, a=b, p=q)
    return Task(write(asked, dice, a=a, p=p), "", *answers)


_REPLIES = [  # what the neighbour says, a polite reply, a rude one
    ("May I borrow your @colour {x}?",
     "Of course, {a}[, you may borrow it|]. Please bring it back [soon|tomorrow].",
     "No, {a}, you may not. [Leave me alone|Go and buy your own]."),
    ("I have [cooked|made] some {a.food} for you.",
     "Thank you, {a}, that is very kind. I [love|like] {a.food}.",
     "I do not want it, {a}. [Eat it yourself|I hate {a.food}]."),
    ("I am sorry, I broke your @colour {x}.", "Never mind, {a}, we can mend [it|the {x}] together.",
     "You are so stupid, {a}. [Go away|You ruin everything]."),
    ("Will you come to {p} with me to {p.errand}?",
     "[Gladly|With pleasure], {a}! I will come to {p} with you.",
     "With you, {a}? Never! [I would be bored|Go alone]."),
    ("Good morning! How are you today?", "Good morning, {a}! I am well, thank you. And you?",
     "That is none of your business, {a}. Now go away."),
    ("I have lost my @colour {x} near {p}.",
     "I am sorry, {a}. I will help you to look for it near {p}.",
     "That serves you right, {a}. Do not ask me to look for it."),
    ("Could you help me to carry @number bags to {p}?",
     "Of course, {a}, I will gladly help you to carry them.",
     "Carry them yourself, {a}. I am no donkey of yours."),
]


def reply(dice: Dice) -> Task:
    says, polite, rude = dice.pick(_REPLIES)
    facts = {"a": dice.pick(PEOPLE), "p": dice.pick(PLACES), "x": dice.pick(THINGS)}
    asked = ('Your neighbour {a} says: "' + says
             + '" [Reply politely|Give a polite answer|Answer kindly].')
    return Task(write(asked, dice, **facts), "", write(polite, dice, **facts),
                write(rude, dice, **facts))
