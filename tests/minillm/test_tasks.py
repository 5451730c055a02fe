"""Tasks whose answers are texts: reading, splitting, and shortening articles, never summaries."""

import csv
import json
import random

import pytest

from gpt2 import GPT2Tokenizer
from minillm.data.batches import encode_samples
from minillm.data.course_files import LAYOUTS, ask_about_post, block, read_posts, read_references
from minillm.data.samples import shorten
from minillm.data.tasks import TASKS, sentences
from minillm.data.templates import TEMPLATES, Template
from minillm.errors import UserError
from minillm.losses import IGNORED
from minillm.text_metrics import ROUGE, rouge_report
from tests.conftest import shared

SUMMARY, TLDR = TEMPLATES["summary"], TEMPLATES["tldr"]


def write_csv(path, rows, columns=("article", "highlights", "id")):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def article(number: int, words: int = 30) -> dict:
    text = " ".join(f"word{number}x{i}," for i in range(words))
    return {"article": f"{text}\nThe end.", "highlights": f"First {number}.\nSecond.", "id": number}


def post(number: int, paragraphs: int = 3) -> dict:
    text = "\n".join(f"Paragraph {i} of post {number} has words." for i in range(paragraphs))
    return {"id": str(number), "subreddit": "tea", "title": f"Title {number}", "post": text,
            "summary": f"Sum {number}."}  # fmt: skip


@pytest.fixture(params=["sentencepiece", "bpe"])
def any_tokenizer(request, tokenizer, bpe):
    return tokenizer if request.param == "sentencepiece" else bpe


def test_an_article_and_its_summary_are_one_sequence_with_the_article_masked(
    any_tokenizer, tmp_path
):
    path = write_csv(tmp_path / "a.csv", [article(i) for i in range(40)])
    sample = TASKS["cnn_dailymail"].read(path, SUMMARY).train[0]
    assert sample.prompt == f"{sample.row['article']}\n\nTL;DR:"
    (row,) = encode_samples([sample], any_tokenizer, 2000).rows
    supervised = row.labels[row.labels != IGNORED].tolist()
    assert supervised[-1] == any_tokenizer.eos_id
    assert any_tokenizer.decode(supervised[:-1]).strip() == sample.row["highlights"]
    start = row.tokens[: len(row.tokens) - len(supervised)].tolist()
    assert start == any_tokenizer.encode(sample.prompt, bos=True)


def test_the_article_is_shortened_and_never_the_summary(any_tokenizer, tmp_path):
    path = write_csv(tmp_path / "a.csv", [article(i, 300 if i % 2 else 5) for i in range(40)])
    samples = TASKS["cnn_dailymail"].read(path, SUMMARY).train
    whole = [len(encode_samples([s], any_tokenizer, 9999).rows[0].tokens) for s in samples]
    encoded = encode_samples(samples, any_tokenizer, 200)
    assert encoded.shortened == sum(n > 200 for n in whole) > 0
    assert (encoded.truncated, encoded.dropped) == (0, 0)
    for sample, row in zip(samples, encoded.rows, strict=True):
        text = any_tokenizer.decode(row.tokens[1:-1].tolist())
        assert len(row.tokens) <= 200 and row.tokens[-1] == any_tokenizer.eos_id
        assert text.strip().endswith(f"TL;DR: {sample.row['highlights']}")
    assert "prompts shortened" in encoded.summary()


def test_a_summary_that_does_not_fit_even_alone_is_dropped_and_counted(any_tokenizer, tmp_path):
    path = write_csv(tmp_path / "a.csv", [article(i) for i in range(40)])
    samples = TASKS["cnn_dailymail"].read(path, SUMMARY).train[:5]
    encoded = encode_samples(samples, any_tokenizer, 8)
    assert (len(encoded.rows), encoded.dropped, encoded.truncated) == (0, 5, 0)


def test_a_summary_beside_which_no_word_of_its_article_fits_is_dropped(any_tokenizer, tmp_path):
    path = write_csv(tmp_path / "a.csv", [article(i, 80) for i in range(20)])
    samples = TASKS["cnn_dailymail"].read(path, SUMMARY).train
    cut = samples[0].prompt[samples[0].body.end :]
    least = len(any_tokenizer.encode(cut, bos=True))
    answer = max(len(encode_samples([s], any_tokenizer, 9999).rows[0].tokens)
                 - len(any_tokenizer.encode(s.prompt, bos=True)) for s in samples)  # fmt: skip
    for length in range(least, least + answer + 30):
        encoded = encode_samples(samples, any_tokenizer, length)
        asked = [row.tokens[row.labels == IGNORED].tolist() for row in encoded.rows]
        assert not any(any_tokenizer.decode(ids[1:]).strip() == cut.strip() for ids in asked)
        assert len(encoded.rows) + encoded.dropped == len(samples)
    assert len(encoded.rows) == len(samples)


def test_shortening_keeps_the_most_that_fits_in_front(any_tokenizer, tmp_path):
    path = write_csv(tmp_path / "a.csv", [article(i, 80) for i in range(20)])
    sample = TASKS["cnn_dailymail"].read(path, SUMMARY).train[0]
    length = len(any_tokenizer.encode(sample.prompt, bos=True))
    assert shorten(sample, any_tokenizer, length) is sample
    for room in (20, 57, 120, length - 1):
        prompt = shorten(sample, any_tokenizer, room).prompt
        kept = prompt.removesuffix("\n\nTL;DR:")
        assert prompt != kept and sample.row["article"].startswith(kept)
        assert len(any_tokenizer.encode(prompt, bos=True)) <= room
        following = sample.row["article"][len(kept) :].split()[0]
        longer = f"{kept} {following}\n\nTL;DR:"
        assert len(any_tokenizer.encode(longer, bos=True)) > room


def test_a_post_is_cut_at_a_line_and_at_a_word_where_one_line_is_too_long(bpe):
    sample = ask(post(1, 12))
    room = len(bpe.encode(sample.prompt, bos=True)) - 5
    kept = shorten(sample, bpe, room).prompt.partition("POST: ")[2].removesuffix("\n\nTL;DR:")
    assert sample.row["post"].startswith(f"{kept}\nParagraph")
    one_line = ask({**post(1), "post": " ".join(post(1, 12)["post"].split())})
    kept = shorten(one_line, bpe, room).prompt.partition("POST: ")[2].removesuffix("\n\nTL;DR:")
    assert kept and one_line.row["post"].startswith(kept + " ")


def ask(row: dict):
    from minillm.data.summaries import _post

    return _post(row, TLDR, "here")


def test_a_post_is_asked_in_the_official_words():
    row = post(7)
    asked = f"SUBREDDIT: r/tea\n\nTITLE: Title 7\n\nPOST: {row['post']}\n\nTL;DR:"
    assert ask(row).prompt == asked and ask(row).response == " Sum 7."


def test_a_folder_with_official_names_keeps_its_splits(tmp_path):
    for name, start in (("train", 0), ("valid", 10), ("test", 20)):
        lines = [json.dumps(post(i)) for i in range(start, start + 4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    splits = TASKS["tldr"].read(tmp_path, TLDR)
    titles = [[s.row["title"] for s in side] for side in vars(splits).values()]
    assert titles == [[f"Title {i}" for i in range(start, start + 4)] for start in (0, 10, 20)]


def test_of_a_folder_no_more_is_read_than_is_asked_for(tmp_path):
    for name in ("train", "validation", "test"):
        write_csv(tmp_path / f"{name}.csv", [article(i) for i in range(30)])
    whole = TASKS["cnn_dailymail"].splits(tmp_path, SUMMARY, 5, 3)
    with (tmp_path / "train.csv").open("a") as file:
        file.write('broken,"')
    part = TASKS["cnn_dailymail"].splits(tmp_path, SUMMARY, 5, 3, n_enough=5)
    assert part.train == whole.train[:5] and part.test == whole.test[:5]
    with pytest.raises(UserError, match="broken CSV"):
        TASKS["cnn_dailymail"].splits(tmp_path, SUMMARY, 50, 3, n_enough=50)


def test_a_csv_row_of_too_many_fields_is_told_with_its_line(tmp_path):
    """A comma that is not in quotes would make part of the article its summary."""
    path = write_csv(tmp_path / "a.csv", [article(i) for i in range(40)])
    with path.open("a") as file:
        file.write("Hello, this is an article.,Its summary.,5\n")
    with pytest.raises(UserError, match=r"a.csv:\d+: more fields"):
        TASKS["cnn_dailymail"].read(path, SUMMARY)
    bad = []
    splits = TASKS["cnn_dailymail"].read(path, SUMMARY, bad)
    assert len(bad) == 1 and sum(map(len, vars(splits).values())) == 40


def test_one_file_is_split_by_a_hash_of_its_rows(tmp_path):
    rows = [article(i) for i in range(300)]
    path = write_csv(tmp_path / "a.csv", rows)
    splits = TASKS["cnn_dailymail"].read(path, SUMMARY)
    random.Random(0).shuffle(rows)
    again = TASKS["cnn_dailymail"].read(write_csv(path, rows), Template("x", "{article} So:"))
    for name, side in vars(splits).items():
        texts = {s.row["article"] for s in side}
        assert texts == {s.row["article"] for s in getattr(again, name)}
        assert len(side) > 0.04 * 300
    assert len(splits.train) > 0.7 * 300


@pytest.mark.parametrize(("change", "columns", "what"), [
    ({}, ("article", "id"), "highlights"), ({}, ("highlights",), "article"),
    ({"highlights": "  "}, None, "highlights"), ({"article": ""}, None, "article"),
])  # fmt: skip
def test_a_missing_or_empty_column_is_named_with_its_line(tmp_path, change, columns, what):
    rows = [article(0), {**article(1), **change}]
    path = write_csv(tmp_path / "a.csv", rows, columns or ("article", "highlights", "id"))
    with pytest.raises(UserError, match=rf"a\.csv:\d+: .*'{what}'"):
        TASKS["cnn_dailymail"].read(path, SUMMARY)


@pytest.mark.parametrize("task", ["cnn_dailymail", "tldr"])
def test_a_row_that_is_no_utf8_is_named_or_left_out_alone(tmp_path, task):
    if task == "tldr":
        path = tmp_path / "p.jsonl"
        path.write_text("\n".join(json.dumps(post(i)) for i in range(40)))
    else:
        path = write_csv(tmp_path / "a.csv", [article(i) for i in range(40)])
    content = path.read_bytes()
    for mark in (b"word20x3", b"Title 20"):
        content = content.replace(mark, b"caf\xe9")
    path.write_bytes(content)
    template, bad = TEMPLATES[TASKS[task].template], []
    with pytest.raises(UserError, match=rf"{path.name}:\d+: not UTF-8"):
        TASKS[task].read(path, template)
    splits = TASKS[task].read(path, template, bad)
    assert len(bad) == 1 and sum(map(len, vars(splits).values())) == 39


@pytest.mark.parametrize("content", ["", "article,highlights\n", 'article,highlights\n"a'])
def test_an_empty_or_broken_csv_is_named(tmp_path, content):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=r"a\.csv"):
        TASKS["cnn_dailymail"].read(tmp_path / "a.csv", SUMMARY)


def test_a_csv_record_may_hold_any_mark_but_its_own(tmp_path):
    rows = [{**article(i), "article": f"a\x85b\u2028c {i}"} for i in range(4)]
    path = write_csv(tmp_path / "a.csv", rows)
    splits = TASKS["cnn_dailymail"].read(path, SUMMARY)
    found = {s.row["article"] for side in vars(splits).values() for s in side}
    assert found == {row["article"] for row in rows}


@pytest.mark.parametrize("field", ["summary", "title", "subreddit", "post"])
def test_a_post_without_a_field_is_named(tmp_path, field):
    row = {key: value for key, value in post(1).items() if key != field}
    (tmp_path / "p.jsonl").write_text(json.dumps(post(0)) + "\n" + json.dumps(row))
    with pytest.raises(UserError, match=rf"p\.jsonl:2: .*'{field}'"):
        TASKS["tldr"].read(tmp_path / "p.jsonl", TLDR)


def test_passages_give_a_line_and_are_split_by_place(tmp_path):
    lines = [f"HAMLET:\nline {i} of the play,\nand more of {i}.\n" for i in range(200)]
    (tmp_path / "play.txt").write_text("\n".join(lines))
    splits = TASKS["shakespeare"].read(tmp_path / "play.txt", TEMPLATES["complete"])
    for sample in splits.train:
        assert sample.prompt.endswith(" <complete>") and not sample.prompt.startswith("HAMLET")
        first = sample.prompt.removesuffix(" <complete>")
        assert sample.row.startswith(first + sample.response)
        assert not sample.response.rstrip().endswith("HAMLET:")
    numbers = [
        [int(word) for s in side for word in s.row.replace(".", "").split() if word.isdigit()]
        for side in vars(splits).values()
    ]
    assert max(numbers[0]) <= min(numbers[1]) and max(numbers[1]) <= min(numbers[2])
    texts = "".join(s.row for side in vars(splits).values() for s in side)
    assert all(f"line {i} of" in texts for i in range(200))


def test_plays_with_casts_of_their_own_are_not_torn_apart(tmp_path):
    """What is trained on and what is measured share no play, though none ends at 80 %."""
    casts = {0: 415, 1: 50, 2: 35}  # play: speeches
    text = "\n".join(f"{'ABCDE'[i % 5]} OF {play}:\nline {i} of play {play}\nand so on.\n"
                     for play, n in casts.items() for i in range(n))  # fmt: skip
    (tmp_path / "plays.txt").write_text(text)
    splits = TASKS["shakespeare"].read(tmp_path / "plays.txt", TEMPLATES["complete"])
    train, *others = ("".join(s.row for s in side) for side in vars(splits).values())
    assert "of play 0" in train and "of play 1" not in train
    assert all("of play 0" not in text for text in others)


def test_a_verse_that_ends_in_a_colon_is_no_name(tmp_path):
    speech = "HAMLET:\nThus I say:\nand say again.\n"
    (tmp_path / "play.txt").write_text("\n".join([speech] * 60))
    splits = TASKS["shakespeare"].read(tmp_path / "play.txt", TEMPLATES["complete"])
    texts = [s.prompt.removesuffix(" <complete>") + s.response for s in splits.train]
    verses = sum(text.count("Thus I say:") for text in texts)
    assert verses == sum(s.row.count("Thus I say:") for s in splits.train) > 40


def test_a_users_own_text_goes_where_the_task_is_asked():
    assert TLDR.ask("Words.") == "SUBREDDIT: r/\n\nTITLE: \n\nPOST: Words.\n\nTL;DR:"
    assert TEMPLATES["complete"].ask("A line") == "A line <complete>"
    assert TEMPLATES["prompt"].ask("A line") == "A line"
    alpaca = TEMPLATES["alpaca"]
    assert alpaca.ask("Do.", "It.") == alpaca.fill(instruction="Do.", input="It.")
    assert alpaca.ask("Do.") == alpaca.fill(instruction="Do.", input="")


@pytest.mark.parametrize("task", ["cnn_dailymail", "tldr", "shakespeare", "completion"])
def test_tinyworlds_stand_in_keeps_its_test_split_whatever_the_sizes(task):
    kind = TASKS[task]
    template = TEMPLATES[kind.template]
    small, large = kind.tinyworld(1, 1, template), kind.tinyworld(30, 20, template)
    assert small.test[:100] == large.test[:100]
    assert (len(large.train), len(large.validation)) == (30, 20)
    sides = [{str(s.row) for s in side} for side in vars(large).values()]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def test_lead_3_of_the_real_articles_scores_what_it_should():
    path = shared("cnn_dailymail_1000.csv")
    with path.open(newline="") as file:
        rows = [row for row, _ in zip(csv.DictReader(file), range(400), strict=False)]
    lead = TASKS["cnn_dailymail"].baselines["lead-3"]
    scores = rouge_report([lead(row) for row in rows], [row["highlights"] for row in rows])
    found = [round(100 * scores[kind]["mean"], 2) for kind in ROUGE]
    assert found == [29.20, 11.08, 19.59, 26.01]


@pytest.mark.parametrize(("task", "name", "n"), [
    ("cnn_dailymail", "cnn_dailymail_1000.csv", 1000), ("tldr", "tldr_1945.jsonl", 1945),
])  # fmt: skip
def test_the_real_files_fit_gpt2s_context_by_shortening_alone(task, name, n):
    path, vocabulary = shared(name), GPT2Tokenizer(shared("gpt2_vocab"))
    splits = TASKS[task].read(path, TEMPLATES[TASKS[task].template])
    assert sum(len(side) for side in vars(splits).values()) == n
    encoded = encode_samples(splits.test, vocabulary, 512)
    assert encoded.dropped == encoded.truncated == 0 < encoded.shortened
    assert all(row.tokens[-1] == vocabulary.eos_id for row in encoded.rows)
    assert max(len(row.tokens) for row in encoded.rows) <= 512


def test_the_real_shakespeare_is_split_into_passages():
    splits = TASKS["shakespeare"].read(shared("tinyshakespeare.txt"), TEMPLATES["complete"])
    assert len(splits.train) > 2000 and len(splits.test) > 200
    vocabulary = GPT2Tokenizer(shared("gpt2_vocab"))
    assert vocabulary.decode(vocabulary.encode(" <complete>")[:1]) == " <"
    assert encode_samples(splits.test, vocabulary, 512).dropped == 0


def test_completions_are_taken_as_they_are(tmp_path):
    rows = [{"prompt": f"Is {i} {{even}}?", "completion": f" {i % 2 == 0}"} for i in range(50)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = TASKS["completion"].read(tmp_path / "c.jsonl", TEMPLATES["prompt"])
    found = {(s.prompt, s.response) for side in vars(splits).values() for s in side}
    assert found == {(row["prompt"], row["completion"]) for row in rows}


@pytest.mark.parametrize(("prompt", "completion", "text"), [
    ("A: ", "5", "A: 5"), ("A:  ", "5", "A:  5"), ("A:", "5", "A:5"), ("A: ", " 5", "A: 5"),
])  # fmt: skip
def test_the_last_space_of_a_prompt_goes_to_its_completion(prompt, completion, text, tmp_path):
    row = json.dumps({"prompt": prompt, "completion": completion})
    (tmp_path / "c.jsonl").write_text("\n".join([row] * 20))
    splits = TASKS["completion"].read(tmp_path / "c.jsonl", TEMPLATES["prompt"])
    found = {s.prompt + s.response for side in vars(splits).values() for s in side}
    assert found == {text} and not any(s.prompt.endswith(" ") for s in splits.train)


def test_a_space_that_a_template_keeps_stays_with_its_prompt(tmp_path):
    rows = [{"prompt": f"{i} + 2 = ", "completion": "4"} for i in range(20)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    template = Template("mine", "Q: {prompt}\nA:")
    sample = TASKS["completion"].read(tmp_path / "c.jsonl", template).train[0]
    assert (sample.prompt, sample.response) == (f"Q: {sample.row}\nA:", "4")


def test_sentences_end_at_a_mark_and_white_space():
    text = "One. Two 2.5 times! Three?\nFour"
    assert sentences(text) == ["One.", "Two 2.5 times!", "Three?", "Four"]


def test_the_courses_layout_of_completions():
    line = "=" * 36
    want = (
        f"\n\n=== PREFIX 5 ===\nGreat lords, <complete>\n\n{line}\n\n=== COMPLETION 5-A ===\none\n"
        f"\n{line}\n\n=== COMPLETION 5-B ===\ntwo\n{line}\n{line}\n"
    )
    assert block(LAYOUTS["completions"], 5, "Great lords, <complete>", ["one", "two"]) == want


def test_the_courses_layout_of_summaries_has_one_more_newline():
    line = "=" * 36
    text = block(LAYOUTS["summaries"], 3, "POST: x TL;DR:", ["one"])
    assert text.startswith("\n\n=== POST 3 ===\n") and "=== SUMMARY 3-A ===\none\n" in text
    assert text.endswith(f"one\n\n{line}\n{line}\n")


def test_a_flattened_post_is_asked_in_the_template_it_was_trained_with():
    flat = "SUBREDDIT: r/tea TITLE: A title: two POST: Words and more. TL;DR:"
    sample = ask_about_post(flat, TLDR)
    assert sample.prompt == (
        "SUBREDDIT: r/tea\n\nTITLE: A title: two\n\nPOST: Words and more.\n\nTL;DR:"
    )
    plain = ask_about_post(flat, None)
    assert plain.prompt == flat
    assert flat[plain.body.start : plain.body.end] == "Words and more."


def test_posts_lie_between_blank_lines_and_references_may_be_lines():
    assert read_posts("a b\nc\n\n\nd\n") == ["a b c", "d"]
    assert read_references("one\ntwo\n", 2) == ["one", "two"]
    assert read_references("one\nmore\n\ntwo\n", 2) == ["one more", "two"]


def test_a_csv_that_was_cut_inside_a_field_is_refused(tmp_path):
    path = write_csv(tmp_path / "a.csv", [article(i) for i in range(4)])
    path.write_text(path.read_text() + '"a cut article","the first half of')
    with pytest.raises(UserError, match="broken CSV"):
        TASKS["cnn_dailymail"].read(path, SUMMARY)


def test_windows_line_ends_change_no_sample(tmp_path):
    rows = [article(i) | {"highlights": f"One {i}.\nTwo."} for i in range(30)]
    path = write_csv(tmp_path / "a.csv", rows)
    want = TASKS["cnn_dailymail"].read(path, SUMMARY)
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert TASKS["cnn_dailymail"].read(path, SUMMARY) == want
