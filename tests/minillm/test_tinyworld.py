"""Tinyworld: reproducible, consistent, balanced, and as surprising as it says."""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from minillm.data.tinyworld import articles, instructions, preferences, reviews, stories
from minillm.data.tinyworld.__main__ import main
from minillm.data.tinyworld.dice import Dice
from minillm.data.tinyworld.instructions import KINDS
from minillm.data.tinyworld.phrases import fill, parse, write
from minillm.data.tinyworld.stories import PLOTS, tell
from minillm.data.tinyworld.world import ANIMALS, PEOPLE, PERSON, WILD


def sample() -> list:
    told = [(story.text, story.nats) for story in islice(stories(3), 30)]
    return [told, *(make(40, 3) for make in (instructions, reviews, articles, preferences))]


def test_a_fresh_process_with_another_hash_seed_writes_the_same():
    code = "import json, test_tinyworld as test; print(json.dumps(test.sample()))"
    path = ":".join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONHASHSEED": "7", "PYTHONPATH": path})
    assert json.loads(done.stdout) == json.loads(json.dumps(sample()))


def test_dice_sum_up_minus_log_probability():
    dice = Dice(0)
    dice.pick("abcd")
    dice.sample(range(5), 2)
    assert dice.nats == pytest.approx(math.log(4) + math.log(5 * 4))
    before, hit = dice.nats, dice.chance(0.2)
    assert dice.nats - before == pytest.approx(-math.log(0.2 if hit else 0.8))
    before, letter = dice.nats, dice.weighted("xy", [3, 1])
    assert dice.nats - before == pytest.approx(-math.log(0.75 if letter == "x" else 0.25))
    before = dice.nats
    dice.shuffle("abc")
    assert dice.nats - before == pytest.approx(math.log(6))


def test_surprisal_agrees_with_the_frequency_of_the_text():
    """A template whose variants all differ: nats must be the true -ln p of each text."""
    seen, nats, n, dice = Counter(), {}, 20_000, Dice(5)
    for _ in range(n):
        before = dice.nats
        text = fill("[a|b|c [d|e]]", dice)
        seen[text] += 1
        nats[text] = dice.nats - before
    assert sum(math.exp(-value) for value in nats.values()) == pytest.approx(1)
    for text, count in seen.items():
        assert count / n == pytest.approx(math.exp(-nats[text]), rel=0.1)


def test_only_written_variants_cost_nats():
    dice = Dice(0)
    fill("[one [a|b|c|d]|two]", dice)
    assert dice.nats in (pytest.approx(math.log(2)), pytest.approx(math.log(8)))


def test_templates_are_polished():
    assert write("a orange {x}. it is a unit", Dice(0), x="egg") == "An orange egg. It is a unit"
    with pytest.raises(AssertionError, match="unbalanced"):
        parse("[a|b")


def test_stories_are_distinct_and_of_the_promised_length():
    told = list(islice(stories(), 1500))
    assert len({story.text for story in told}) == len(told)
    words = [len(story.text.split()) for story in told]
    assert min(words) >= 80 and max(words) <= 200
    assert 0.5 < sum(story.nats for story in told) / sum(words) < 1.6
    for story in told:
        assert not set("[]{}|@") & set(story.text) and "  " not in story.text
        assert story.text[-1] in '.!?"' and story.text.count('"') % 2 == 0


def test_stories_of_other_seeds_are_other_stories():
    first, second = ({story.text for story in islice(stories(seed), 500)} for seed in (1, 2))
    assert not first & second


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_names_its_hero(plot):
    for seed in range(30):
        tale = tell(Dice(seed), plot)
        assert tale.facts["a"].name in tale.text


def test_the_lost_thing_is_found_where_it_was_lost():
    for seed in range(300):
        tale = tell(Dice(seed), "lost_thing")
        place, x = tale.facts["lost"], tale.facts["x"]
        put, found = [i for i, line in enumerate(tale.sentences) if place.spot in line]
        assert put < found and x in tale.sentences[found]


def test_the_way_leads_past_the_landmarks_in_the_order_told():
    for seed in range(100):
        tale = tell(Dice(seed), "lost_way")
        p, q, r = (tale.facts[key].feature for key in "pqr")
        told = next(line for line in tale.sentences if p in line)
        assert told.index(p) < told.index(q) < told.index(r)
        assert tale.facts["r"].name == tale.facts["b"].near


def test_the_world_is_closed():
    assert len(PEOPLE) == 40 == len(PERSON)
    for person in PEOPLE:
        assert PERSON[person.friend].friend == person.name != person.friend


def test_instructions_are_distinct_and_balanced():
    rows = instructions(2100)
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows) == 2100
    assert 0.55 < sum(row["input"] == "" for row in rows) / len(rows) < 0.65
    assert all(2 <= len(row["output"].split()) <= 40 for row in rows)
    assert instructions(100) == rows[:100]
    assert len(KINDS) >= 12


def test_facts_are_the_facts_of_the_world():
    for kind, attribute in (("friend", "friend"), ("home", "home"), ("job", "does")):
        for seed in range(50):
            task = KINDS[kind](Dice(seed))
            words = re.findall(r"\w+", task.instruction)
            (person,) = (p for p in PEOPLE if p.name in words)
            assert getattr(person, attribute) in task.output
            assert getattr(person, attribute) not in task.wrong


def test_lists_are_worked_on_correctly():
    words = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]
    numbers = dict(zip(words, range(2, 10), strict=True))
    for seed in range(200):
        task = KINDS["count"](Dice(seed))
        assert numbers[task.output.split()[2]] == task.input.count(",") + 1
        task = KINDS["backwards"](Dice(seed))
        items = _items(task)
        assert task.output.lower() == ", ".join(items[::-1]) + "." != task.wrong
        task = KINDS["find_animals"](Dice(seed))
        first, second = (item for item in _items(task) if item in ANIMALS + WILD)
        assert task.output == f"The animals are {first} and {second}."


def _items(task) -> list[str]:
    return (task.input or task.instruction.split(": ")[1]).rstrip(".").split(", ")


def test_no_single_word_tells_a_good_review_from_a_bad_one():
    """A unigram naive Bayes trained on 4000 must stay near chance on 1000 more."""
    rows = reviews(5000)
    assert sum(row["label"] for row in rows) == 2500
    words = {0: Counter(), 1: Counter()}
    for row in rows[:4000]:
        words[row["label"]].update(set(_tokens(row["text"])))
    assert _accuracy(rows[4000:], words) < 0.6


def _tokens(text: str) -> list[str]:
    return text.lower().replace(".", " ").replace(",", " ").split()


def _accuracy(rows: list[dict], words: dict[int, Counter]) -> float:
    hits = 0
    for row in rows:
        present = set(_tokens(row["text"]))
        score = sum(math.log((words[1][w] + 1) / (words[0][w] + 1)) for w in present)
        hits += (score > 0) == row["label"]
    return hits / len(rows)


def test_highlights_are_not_the_lead():
    rows = articles(200)
    assert len({row["id"] for row in rows}) == 200
    for row in rows:
        lines = row["highlights"].split("\n")
        assert 2 <= len(lines) <= 3 and 90 <= len(row["article"].split()) <= 200
        lead = set(_tokens(". ".join(row["article"].split(". ")[:3])))
        late = set(_tokens(lines[-1])) & set(_tokens(row["article"])) - lead
        assert late, "the last highlight holds nothing from late in the article"
        assert not any(line in row["article"] for line in lines)


def test_preferences_cannot_be_told_by_length():
    rows = preferences(1000)
    assert len({row["prompt"] for row in rows}) == 1000
    chosen, rejected = (sum(len(row[key]) for row in rows) / 1000 for key in ("chosen", "rejected"))
    assert chosen == pytest.approx(rejected, rel=0.05)
    gaps = [len(row["chosen"]) - len(row["rejected"]) for row in rows]
    assert abs(sum(gap > 0 for gap in gaps) - sum(gap < 0 for gap in gaps)) < 100
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_other_seeds_give_other_rows():
    for make in (reviews, articles, preferences):
        first, second = ({json.dumps(row) for row in make(200, seed)} for seed in (1, 2))
        assert len(first & second) < 60, make.__name__


def test_the_command_writes_every_file(tmp_path):
    main(f"--out {tmp_path} --stories 5 --instructions 30 --reviews 10 --articles 3".split())
    names = " ".join(sorted(path.name for path in tmp_path.iterdir()))
    assert names == ("articles.csv instructions.json preferences.jsonl rt-polarity.neg "
                     "rt-polarity.pos stories.txt")
    assert len((tmp_path / "stories.txt").read_text().split("\n\n")) == 5
    assert len((tmp_path / "rt-polarity.pos").read_text().splitlines()) == 5
