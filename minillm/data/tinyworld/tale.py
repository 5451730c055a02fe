"""What every plot needs: a cast, a place for each scene, and sentences that remember both."""

from minillm.data.tinyworld.dice import Dice
from minillm.data.tinyworld.phrases import fill, write
from minillm.data.tinyworld.words import LISTS
from minillm.data.tinyworld.world import COLOURS, PEOPLE, PERSON, PLACES, THINGS, Person

# What is always true of a person; X stands for the person's place in the cast.
_FACTS = [
    "{X} the {X.kind} [lived|had always lived] in {X.home}",
    "{X} lived in {X.home} and {X.did}[ all week long|]",
    "{X} was a {X.kind} who {X.did}[ and lived in {X.home}|]",
    "{X} the {X.kind} {X.did} [for a living|every day|most days], [but today was free|but not "
    "today]",
    "{X}'s favourite colour was {X.colour}[, and {X.his} favourite food was {X.food}|]",
    "[{X} liked {X.food} better than any other food|{X} loved {X.food} more than anything]",
    "{X}'s best friend was {X.friend}[, and everyone [knew it|in town knew that]|]",
    "{X} and {X.friend} were best friends[ and told each other everything|]",
    "{X}'s [greatest|dearest] treasure was a {X.treasure}[, which {X.he} kept in {X.home}|]",
    "{X} was [not afraid of much|brave], [but {X.he} [feared|was afraid of] {X.fear}|except "
    "about {X.fear}]",
]


class Tale:
    """A story on its way: templates may name its `facts`; `sentences` is what has been written."""

    def __init__(self, dice: Dice) -> None:
        self.dice = dice
        self.sentences: list[str] = []
        self.facts: dict = {}
        self._used: list[str] = []

    def say(self, *templates: str) -> None:
        """Writes one of the templates."""
        self.sentences.append(write(self.dice.pick(templates), self.dice, **self.facts))

    def maybe(self, *templates: str) -> None:
        """Writes one of the templates, or nothing, half of the time."""
        if self.dice.chance(0.5):
            self.say(*templates)

    def cast(self, count: int) -> list[Person]:
        """Puts a, b, c ... on the stage; b is a's best friend every second time."""
        a = self.dice.pick(PEOPLE)
        others = [p for p in PEOPLE if p.name not in (a.name, a.friend)]
        if count > 1 and self.dice.chance(0.5):
            people = [a, PERSON[a.friend], *self.dice.sample(others, count - 2)]
        else:
            people = [a, *self.dice.sample(others, count - 1)]
        self.facts |= dict(zip("abcd", people, strict=False))
        return people

    def places(self, count: int, outdoors: bool = False) -> list:
        """Puts the places p, q, r ... on the map, each different."""
        chosen = self.dice.sample([p for p in PLACES if p.outdoors or not outdoors], count)
        self.facts |= dict(zip("pqr", chosen, strict=False))
        return chosen

    def things(self, count: int) -> None:
        """Chooses x, y, z: different things, each with a colour."""
        colours, things = self.dice.sample(COLOURS, count), self.dice.sample(THINGS, count)
        for key, colour, thing in zip("xyz", colours, things, strict=False):
            self.facts |= {key: f"{colour} {thing}", key + "_": thing}  # "red kite" and "kite"

    def let(self, **templates: str) -> None:
        """Adds facts that are themselves written from templates."""
        for key, template in templates.items():
            self.facts[key] = fill(template, self.dice, **self.facts)

    def weather(self) -> None:
        """Opens the tale with the weather, which then stays."""
        self.facts["sky"] = self.dice.pick(["sunny", "windy", "cloudy"])
        self.say(f"@{self.facts['sky']}.")

    def still(self) -> None:
        """Says, half of the time, that the weather has not changed."""
        self.maybe(f"@{self.facts['sky']}_still.")

    def extra(self, who: str = "a") -> None:
        """Writes, most of the time, what a member of the cast sees, hears or smells."""
        if self.dice.chance(0.2):
            return
        self.facts["e"] = self.facts[who]
        extra = self.dice.pick(LISTS["extra"])
        if "{d}" in extra:
            cast = [self.facts[key] for key in "abc"]
            self.facts["d"] = self.dice.pick([p for p in PEOPLE if p not in cast])
        self.say(extra + ".")

    def fact(self, who: str) -> None:
        """Writes, most of the time, one lasting fact of a member of the cast."""
        if self.dice.chance(0.25):
            return
        fact = self.dice.pick([f for f in _FACTS if f not in self._used])
        self._used.append(fact)
        self.say(fact.replace("X", who) + ".")

    @property
    def text(self) -> str:
        return " ".join(self.sentences)
