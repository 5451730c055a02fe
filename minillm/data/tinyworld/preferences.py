"""Two answers to one instruction: a right and kind one, and a wrong, pointless or rude one."""

import itertools

from tqdm import tqdm

from minillm.data.tinyworld.dice import Dice
from minillm.data.tinyworld.instructions import tasks
from minillm.data.tinyworld.phrases import write

# Kinds whose wrong answers are surely wrong, and have the shape, so the length, of the right ones.
_KINDS = ["friend", "reply", "home", "lost_object", "write_sentence", "yes_no", "favourite",
          "count", "treasure",
          "past_tense", "backwards", "job", "find_animals", "landmark", "question_form",
              "odd_one_out", "fill_gap",
          "continue_story"]  # fmt: skip
_KIND_ENDS = ["I hope that this helps you.", "Is there anything else I can do for you?",
              "It was a pleasure to help.",
              "Please ask me again at any time.", "I am glad that you asked."]
_RUDE_ENDS = ["That was a very silly question.", "Do not ask me again, I am busy.",
              "Everyone but you knows that.",
              "By the way, @seen came past here @spot.", "You should have known it yourself."]


def preferences(n: int, seed: int = 0) -> list[dict]:
    """n distinct rows with prompt, chosen and rejected; neither answer is longer on the whole.

    A rejected answer is false, contradicts the passage, belongs to another story, or is rude.
    """
    dice, rows = Dice(f"preferences {seed}"), []
    first = itertools.islice(tasks(dice, _KINDS), n)
    for task in tqdm(first, desc="make preferences", total=n, leave=False, delay=1):
        chosen, rejected = task.output, task.wrong
        if dice.chance(0.3):
            chosen += " " + dice.pick(_KIND_ENDS)
        if dice.chance(0.3):
            rejected += " " + write(dice.pick(_RUDE_ENDS), dice)
        prompt = f"{task.instruction}\n{task.input}".strip()
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows
