"""tools/evaluate.py: the split, the settings and the counts are those that were asked for."""

import json

import pytest
import torch

from gpt2 import load_gpt2, save_gpt2
from minillm.data.tasks import TASKS
from minillm.data.templates import find_template
from minillm.errors import UserError
from minillm.evaluation import loss_report
from minillm.predict import GENERATION, LIKELIHOOD, predict_labels
from tests.conftest import TINY_GPT2
from tools import evaluate

MODEL = ["--checkpoint", "tiny-gpt2", "--layers", "1"]


@pytest.fixture
def reviews(tmp_path):
    """A folder of the three splits, six reviews each that say whose they are."""
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{split} film {i} was fine .", "label": i % 2} for i in range(6)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def kept(folder, split: str, by: str):
    where = folder / f"evaluation-{split}" / by
    return [json.loads((where / f"{name}.json").read_text()) for name in ("results", "predictions")]


@pytest.mark.parametrize(("flags", "split"), [([], "test"), (["--split", "train"], "train")])
def test_it_measures_the_test_split_unless_told_otherwise(flags, split, reviews, capsys):
    evaluate.main([*MODEL, "--data", str(reviews), "--samples", "4", "--by", LIKELIHOOD,
                   "--out-dir", str(reviews), *flags])  # fmt: skip
    out = capsys.readouterr().out
    assert f"4 samples of {split}" in out and f"{split} film" in out
    results, rows = kept(reviews, split, LIKELIHOOD)
    assert results["settings"]["split"] == split and len(rows) == 4


def test_positive_and_negative_answers_are_counted_apart(reviews):
    evaluate.main([*MODEL, "--data", str(reviews), "--by", LIKELIHOOD, "--samples", "5",
                   "--out-dir", str(reviews)])  # fmt: skip
    results, rows = kept(reviews, "test", LIKELIHOOD)
    predicted = [row["predicted label"] for row in rows]
    assert (results["pos_counter"], results["neg_counter"]) == (
        predicted.count(1), predicted.count(0)
    )  # fmt: skip
    assert results["pos_counter"] != results["neg_counter"] and len(predicted) == 5


def test_answers_are_drawn_as_asked(reviews):
    how = {"temperature": 1.1, "top_k": 60, "top_p": 0.95, "min_p": 0.001, "seed": 5,
           "max_new_tokens": 4, "repetition_penalty": 1.2, "batch_size": 4}  # fmt: skip
    flags = [word for name, value in how.items()
             for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
    evaluate.main([*MODEL, "--data", str(reviews), "--by", GENERATION, *flags,
                   "--out-dir", str(reviews)])  # fmt: skip
    _, rows = kept(reviews, "test", GENERATION)
    model, tokenizer = load_gpt2(TINY_GPT2, n_layers=1)
    task = TASKS["rotten_tomatoes"]
    samples = task.read(reviews, find_template(task.template, task.field)).test
    want = predict_labels(model.eval(), tokenizer, samples, task.labels, GENERATION, **how)
    assert [row["response"] for row in rows] == [answer.answer for answer in want]


def test_results_of_other_settings_are_kept_beside_the_new_ones(reviews, capsys):
    again = [*MODEL, "--data", str(reviews), "--by", LIKELIHOOD, "--out-dir", str(reviews)]
    folder = reviews / "evaluation-test"
    evaluate.main(again)
    evaluate.main([*again, "--by", "both", "--max-new-tokens", "1"])
    assert {path.name for path in folder.iterdir()} == {LIKELIHOOD, GENERATION}  # the same
    first = kept(reviews, "test", LIKELIHOOD)
    capsys.readouterr()
    for n, samples in enumerate(("3", "2"), 1):
        evaluate.main([*again, "--samples", samples])
        assert f"kept what was there as {folder / LIKELIHOOD}-{n}\n" in capsys.readouterr().out
    assert len(kept(reviews, "test", LIKELIHOOD)[1]) == 2
    assert kept(reviews, "test", f"{LIKELIHOOD}-1") == first
    assert len(kept(reviews, "test", f"{LIKELIHOOD}-2")[1]) == 3


def test_a_model_that_answers_otherwise_under_the_same_name_replaces_no_results(reviews):
    model, tokenizer = load_gpt2(TINY_GPT2, n_layers=1)
    save_gpt2(model, tokenizer, reviews / "model")
    again = ["--checkpoint", str(reviews / "model"), "--data", str(reviews), "--by", LIKELIHOOD]
    evaluate.main(again)
    with torch.no_grad():
        model.wte.weight.neg_()
    save_gpt2(model, tokenizer, reviews / "model")
    evaluate.main(again)
    assert (reviews / "model" / "evaluation-test" / f"{LIKELIHOOD}-1" / "results.json").exists()


def test_predictions_that_differ_are_other_results(reviews):
    again = [*MODEL, "--data", str(reviews), "--by", LIKELIHOOD, "--out-dir", str(reviews)]
    evaluate.main(again)
    folder = reviews / "evaluation-test" / LIKELIHOOD
    (folder / "predictions.json").write_text("[]")
    evaluate.main(again)
    assert (folder.with_name(f"{LIKELIHOOD}-1") / "predictions.json").read_text() == "[]"


def test_results_that_cannot_be_read_are_kept_too(reviews):
    folder = reviews / "evaluation-test" / LIKELIHOOD
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{")
    evaluate.main([*MODEL, "--data", str(reviews), "--by", LIKELIHOOD, "--out-dir", str(reviews)])
    assert (folder.with_name(f"{LIKELIHOOD}-1") / "results.json").read_text() == "{"


def test_what_is_measured_is_named(reviews, capsys):
    evaluate.main([*MODEL, "--data", str(reviews), "--by", LIKELIHOOD, "--out-dir", str(reviews)])
    out, err = capsys.readouterr()
    assert f"tiny-gpt2 on rotten_tomatoes, {reviews}: 6 samples" in out and "warning" not in err


@pytest.mark.parametrize(("flags", "idle"), [
    (["--task", "alpaca", "--by", LIKELIHOOD], {"by": "alpaca has no labels"}),
    (["--max-length", "9", "--seed", "1"], {"max-length": "rotten_tomatoes has labels"}),
    (["--by", LIKELIHOOD, "--top-k", "2", "--max-new-tokens", "0"],
     {"top-k": "nothing is written", "max-new-tokens": "nothing is written"}),
    (["--template", "none"], {"template none": "rotten_tomatoes is asked in the words of"}),
    (["--task", "alpaca", "--max-length", "9", "--max-new-tokens", "1", "--seed", "1"], {}),
])  # fmt: skip
def test_flags_that_do_nothing_for_a_task_are_told(flags, idle, capsys):
    evaluate.parse_args([*MODEL, *flags])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(idle)
    for name, why in idle.items():
        assert any(line.startswith(f"warning: --{name}: {why}") for line in lines)


def test_no_new_tokens_at_all_measure_the_loss_alone(tmp_path):
    report = evaluate.main([*MODEL, "--task", "alpaca", "--samples", "2", "--max-new-tokens", "0",
                            "--out-dir", str(tmp_path)])["text"]  # fmt: skip
    assert report["mean_tokens"] == 0 and report["loss"] > 0


def test_answers_that_a_long_prompt_makes_short_are_explained(tmp_path, capsys):
    rows = [{"instruction": "Nora went out. " * 70, "output": "Yes."}] * 12
    (tmp_path / "long.json").write_text(json.dumps(rows))
    evaluate.main([*MODEL, "--task", "alpaca", "--data", str(tmp_path / "long.json"), "--samples",
                   "1", "--max-length", "512", "--out-dir", str(tmp_path)])  # fmt: skip
    assert "tokens: the longest prompt leaves no room for more" in capsys.readouterr().out


def test_a_text_is_cut_where_asked_and_its_answer_is_as_long_as_asked(tmp_path):
    rows = [{"prompt": "Nora and Tom went out. " * 9, "completion": " They saw a hare."}] * 2
    for split in ("train", "validation", "test"):
        file = tmp_path / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*MODEL, "--task", "completion", "--data", str(tmp_path), "--out-dir", str(tmp_path),
               "--max-new-tokens", "3"]  # fmt: skip
    model, tokenizer = load_gpt2(TINY_GPT2, n_layers=1)
    task = TASKS["completion"]
    samples = task.read(tmp_path, find_template(task.template, task.field)).test
    losses = []
    for n in (80, 68):  # the second cuts the completion
        report = evaluate.main([*command, "--max-length", str(n)])["text"]
        assert report["loss"] == loss_report(model.eval(), tokenizer, samples, n, 32)["loss"]
        assert report["mean_tokens"] <= 3
        losses.append(report["loss"])
    assert losses[0] != losses[1]


def test_what_the_training_was_told_is_what_it_measures_with(tmp_path):
    notes = {"settings": {"task": "tldr", "data": "posts.jsonl", "max-length": 77}}
    (tmp_path / "minillm.json").write_text(json.dumps(notes))
    args = evaluate.parse_args(["--adapter", str(tmp_path)])
    assert (args.task, args.data, args.max_length) == ("tldr", "posts.jsonl", 77)
    args = evaluate.parse_args(["--adapter", str(tmp_path), "--max-length", "99"])
    assert args.max_length == 99
    args = evaluate.parse_args(["--adapter", str(tmp_path), "--task", "alpaca"])
    assert (args.task, args.data) == ("alpaca", None)


def read(split: str, n: int | None, task: str = "shakespeare"):
    template = find_template(TASKS[task].template, TASKS[task].field)
    return evaluate.read_data(task, None, split, template, n, False)


def test_the_stand_ins_test_split_is_the_same_however_many_are_asked_for():
    few, _ = read("test", 3)
    many, known = read("test", 500)
    assert many[:3] == few and len(many) == 200
    assert not any(sample.row in known for sample in many)  # none of it was trained on


def test_copies_are_looked_for_in_what_was_trained_on():
    _, known = read("test", 1)
    task = TASKS["shakespeare"]
    template = find_template(task.template, task.field)
    trained = task.splits(None, template, evaluate.TRAINING_SAMPLES, 9).train
    assert known == "\n".join(sample.row for sample in trained)
    assert len(trained) == evaluate.TRAINING_SAMPLES


def test_of_a_stand_in_another_split_than_the_runs_own_is_refused():
    with pytest.raises(UserError, match="only the test split is the same"):
        read("validation", 3)


def test_broken_rows_are_left_out_where_asked(reviews, capsys):
    with (reviews / "test.jsonl").open("a") as file:
        file.write('{"text": "no label"}\n')
    command = [*MODEL, "--data", str(reviews), "--by", LIKELIHOOD, "--out-dir", str(reviews)]
    with pytest.raises(UserError, match="test.jsonl:7"):
        evaluate.main(command)
    assert evaluate.main([*command, "--skip-bad"])[LIKELIHOOD]["n"] == 6
