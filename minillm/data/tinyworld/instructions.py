"""Instructions with answers, of 21 kinds: about the world, about words, about a text."""

import itertools
from collections.abc import Callable, Iterator

from tqdm import tqdm

from minillm.data.tinyworld import about_text, about_words, about_world
from minillm.data.tinyworld.asking import Task
from minillm.data.tinyworld.dice import Dice

KINDS: dict[str, Callable[[Dice], Task]] = {
    kind.__name__: kind
    for kind in (
        about_world.friend, about_world.job, about_world.home, about_world.favourite,
        about_world.treasure, about_world.landmark, about_world.fill_gap,
        about_world.write_sentence, about_world.reply,
        about_words.backwards, about_words.find_animals, about_words.odd_one_out,
        about_words.count, about_words.question_form, about_words.past_tense,
        about_words.word_order,
        about_text.lost_object, about_text.yes_no, about_text.title, about_text.weather,
        about_text.continue_story,
    )
}  # fmt: skip


def tasks(dice: Dice, kinds: list[str]) -> Iterator[Task]:
    """Endless distinct tasks, the kinds in turn; a kind with no new ones left drops out."""
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

    The kinds of `KINDS` come in turn, each in several phrasings; a smaller n gives the first rows
    of a larger one.
    """
    first = itertools.islice(tasks(Dice(f"instructions {seed}"), list(KINDS)), n)
    shown = tqdm(first, desc="make instructions", total=n, leave=False, delay=1)
    return [{"instruction": t.instruction, "input": t.input, "output": t.output} for t in shown]
