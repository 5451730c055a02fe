"""The one source of chance in tinyworld, which also adds up the surprisal of its choices."""

import math
import random


class Dice:
    """A seeded random source that sums up -ln(probability) of every choice it makes.

    `nats` bounds the surprisal of the generated text from above: it is the information in the
    choices, and equals that in the text only where different choices always give different texts.
    **Units**: nats.
    """

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(f"tinyworld {seed}")  # a string seeds by SHA-512, not hash()
        self.nats = 0.0

    def pick(self, options):
        """Picks one of a sequence, all equally likely."""
        return options[self._index(len(options))]

    def _index(self, n: int) -> int:
        """One of 0 to n - 1, all equally likely."""
        self.nats += math.log(n)
        return int(self._random.random() * n)

    def weighted(self, options, weights):
        """Picks one of a sequence in proportion to its weight; a weight of zero is never picked."""
        index = self._random.choices(range(len(options)), weights)[0]
        self.nats -= math.log(weights[index] / sum(weights))
        return options[index]

    def chance(self, p: float) -> bool:
        """True with probability p, 0 < p < 1."""
        hit = self._random.random() < p
        self.nats -= math.log(p if hit else 1.0 - p)
        return hit

    def sample(self, options, count: int) -> list:
        """Picks `count` different members of a sequence, in random order."""
        rest = list(options)
        return [rest.pop(self._index(len(rest))) for _ in range(count)]

    def shuffle(self, items) -> list:
        """Returns a shuffled copy."""
        return self.sample(items, len(items))
