"""Endless stories of Pebbleford, and how surprising each is to one who knows the generator."""

from collections.abc import Iterator
from dataclasses import dataclass

from minillm.data.tinyworld.dice import Dice
from minillm.data.tinyworld.plots_home import garden, help_neighbour
from minillm.data.tinyworld.plots_make import bake, build, mend
from minillm.data.tinyworld.plots_roam import fear, lost_thing, lost_way, race, rainy_day
from minillm.data.tinyworld.plots_trust import promise, secret_gift, trade
from minillm.data.tinyworld.tale import Tale

PLOTS = {
    plot.__name__: plot
    for plot in (
        lost_thing, lost_way, fear, race, rainy_day, build, bake, mend, garden, help_neighbour,
        trade, secret_gift, promise,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Story:
    """`nats` is the generator's surprisal of its own choices: an upper bound on -ln p(text)."""

    text: str
    nats: float


def tell(dice: Dice, plot: str | None = None) -> Tale:
    """One tale, of the named plot or of any; `tale.facts` tells who, what and where."""
    tale = Tale(dice)
    PLOTS[plot or dice.pick(list(PLOTS))](tale)
    return tale


def stories(seed: int = 0) -> Iterator[Story]:
    """Endless stories, no two in a row equal; the same seed always gives the same ones.

    Each has 80 to 200 words of plain English and keeps its own state and the facts of `world`.
    **Units**: `nats` of the whole story; divide by its tokens to compare with a model's loss.
    """
    dice, last = Dice(f"stories {seed}"), ""
    while True:
        before = dice.nats
        text = tell(dice).text
        if 80 <= len(text.split()) <= 200 and text != last:
            yield Story(text, dice.nats - before)  # those left out only loosen the bound a little
            last = text
