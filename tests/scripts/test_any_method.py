"""Every method on text tasks through the scripts: train, keep, load again, measure, compare."""

import csv
import json
import statistics
from pathlib import Path

import pytest

from gpt2 import load_gpt2
from minillm import generate as library_generate
from minillm.adapt.methods import METHODS
from minillm.data.course_files import ask_about_post, until_next_cue
from minillm.data.samples import shorten
from minillm.data.templates import TEMPLATES
from minillm.data.tinyworld import articles
from minillm.errors import UserError
from minillm.runs import read_metrics
from tests.conftest import TINY_GPT2, shared
from tools import compare_methods, evaluate, generate, merge_adapter, samples
from tools.cells import parse_training
from tools.models import FAMILIES
from train import dpo, finetune_gpt2, finetune_llama, finetune_phi

SCRIPTS = {"llama": finetune_llama, "gpt2": finetune_gpt2}
CHECKPOINTS = {"llama": "tiny-llama", "gpt2": "tiny-gpt2"}
QUICK = ["--layers", "1", "--precision", "fp32", "--batch-size", "4", "--accumulation-steps", "1",
         "--samples", "12", "--held-out", "4", "--add-biases", "--virtual-tokens", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def news(tmp_path_factory):
    """Sixty of tinyworld's articles as CNN/DailyMail publishes its own."""
    path = tmp_path_factory.mktemp("news") / "articles.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["article", "highlights", "id"])
        writer.writeheader()
        writer.writerows(articles(60))
    return path


def run(model: str, method: str, data, folder, *flags) -> tuple[float, float]:
    return SCRIPTS[model].main([
        *QUICK, "--task", "cnn_dailymail", "--data", str(data), "--method", method,
        "--out-dir", str(folder), *map(str, flags),
    ])  # fmt: skip


@pytest.mark.parametrize("model", [*SCRIPTS])
@pytest.mark.parametrize("method", [*METHODS])
def test_what_a_method_saved_measures_the_same_on_a_fresh_base(
    model, method, news, tmp_path, capsys
):
    before, best = run(model, method, news, tmp_path / "run", "--max-iters", 2)
    assert best != before
    kept = tmp_path / "run" / ("model" if method == "full" else "adapter")
    flag = "--checkpoint" if method == "full" else "--adapter"
    report = evaluate.main([
        flag, str(kept), "--task", "cnn_dailymail", "--data", str(news), "--split", "validation",
        "--samples", "4", "--batch-size", "4", "--max-new-tokens", "3",
    ])["text"]  # fmt: skip
    assert report["loss"] == best
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"{summary['trainable']:,}" in capsys.readouterr().out
    assert summary["flops"] > 0 and summary["memory_mib"]["peak"] >= 0


@pytest.mark.parametrize(
    "method", [pytest.param("prompt_tuning", marks=pytest.mark.slow), "prefix_tuning"]
)
def test_a_stopped_run_goes_on_to_the_same_bits(method, news, tmp_path):
    flags = ["--prefix-hidden", 8, "--lr", "1e-2", "--eval-every", 1, "--epochs", 1]
    whole = run("gpt2", method, news, tmp_path / "whole", *flags)
    run("gpt2", method, news, tmp_path / "cut", *flags, "--max-iters", 1)
    assert run("gpt2", method, news, tmp_path / "cut", *flags, "--resume") == whole


def test_a_methods_own_learning_rate_and_decay_are_its_defaults(news, tmp_path):
    for method in ("prompt_tuning", "lora"):
        run("gpt2", method, news, tmp_path / method, "--max-iters", 1)
    settings = [json.loads((tmp_path / m / "config.json").read_text())
                for m in ("prompt_tuning", "lora")]  # fmt: skip
    assert [s["lr"] for s in settings] == [METHODS["prompt_tuning"].lr, 2.5e-4]
    assert [s["weight-decay"] for s in settings] == [0.0, 0.1]


def test_a_tuned_prompt_generates_and_refuses_to_be_merged(news, tmp_path):
    run("llama", "prompt_tuning", news, tmp_path / "run", "--max-iters", 1)
    adapter = ["--adapter", str(tmp_path / "run" / "adapter")]
    asked = [*adapter, "--prompt", "The cat", "--template", "none", "--max-new-tokens", "6"]
    assert generate.main(asked) == generate.main([*asked, "--no-cache"])
    with pytest.raises(UserError, match="soft prompt"):
        merge_adapter.main([*adapter, "--out", str(tmp_path / "merged")])


def test_merging_claims_nothing_about_an_update_that_is_no_lora(news, tmp_path, capsys):
    run("gpt2", "bitfit", news, tmp_path / "run", "--max-iters", 1)
    adapter = ["--adapter", str(tmp_path / "run" / "adapter"), "--precision", "bf16"]
    merge_adapter.main([*adapter, "--out", str(tmp_path / "merged")])
    assert "what was trained is in its place, in bfloat16; wrote" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    ["--method", "bitfit"], ["--method", "lora", "--frozen-dtype", "fp32", "--targets", "c_attn"],
    ["--method", "full", "--frozen-dtype", "bf16"], ["--method", "last_layer", "--untie",
     "--checkpoint", "untied"], ["--method", "prefix_tuning", "--virtual-tokens", "512"],
    ["--method", "prompt_tuning", "--virtual-tokens", "500"],
])  # fmt: skip
def test_what_a_method_cannot_do_is_said_in_one_line(flags, news, tmp_path):
    with pytest.raises(UserError) as error:
        finetune_llama.main([
            "--task", "cnn_dailymail", "--data", str(news), "--out-dir", str(tmp_path / "r"), *flags
        ])  # fmt: skip
    assert "\n" not in str(error.value)


def test_real_articles_are_shortened_for_any_model(tmp_path, capsys):
    data = shared("cnn_dailymail_1000.csv")
    run("gpt2", "prefix_tuning", data, tmp_path / "run", "--max-iters", 1, "--max-length", 200)
    assert "12 prompts shortened" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "text", "name"), [
    ("completions", "The cat sat\nThe sky", "output_shakespeare_completions_tiny-gpt2.txt"),
    ("summaries", "SUBREDDIT: r/a TITLE: b POST: c d TL;DR:\n\nSUBREDDIT: r/e TITLE: f POST: g "
     "TL;DR:", "output_reddit_summaries_tiny-gpt2.txt"),
])  # fmt: skip
def test_samples_go_into_the_courses_files(kind, text, name, tmp_path):
    (tmp_path / "in.txt").write_text(text)
    (tmp_path / "ref.txt").write_text("one\ntwo\n")
    command = ["--checkpoint", "tiny-gpt2", "--kind", kind, "--inputs", str(tmp_path / "in.txt"),
               "--out-dir", str(tmp_path), "--samples", "2", "--layers", "1",
               "--references", str(tmp_path / "ref.txt")]  # fmt: skip
    written = samples.main(command)
    content = (tmp_path / name).read_text()
    assert content.count("=== ") == 2 + 4 and all(t in content for row in written for t in row)
    score = (tmp_path / "output_rouge_score_tiny-gpt2.txt").read_text().splitlines()
    assert score[1] == "=" * 36 and score[2].startswith("ROUGE-1 mean score: ")
    assert samples.main(command) == written
    about = json.loads((tmp_path / f"{name[:-4]}.json").read_text())
    assert about["settings"]["temperature"] == samples.DEFAULTS[kind]["temperature"]
    assert float(score[2].rpartition(" ")[2]) == pytest.approx(about["rouge1"]["mean"])
    assert len([*tmp_path.glob("output_*")]) == 3  # the same again: nothing to keep
    samples.main([*command, "--temperature", "0"])
    files = [path.stem.removeprefix(Path(name).stem) for path in tmp_path.glob(f"{name[:-4]}*.txt")]
    assert sorted(files) == ["", "-1"]
    assert (tmp_path / f"{name[:-4]}-1.txt").read_text() == content


def test_what_belongs_together_is_kept_under_one_number(tmp_path):
    paths = [tmp_path / name for name in ("a.txt", "b.1.txt", "c.txt")]
    beside = tmp_path / "score.txt"
    beside.write_text("of the old")
    samples.write_all(dict.fromkeys(paths[:2], "old"), beside)
    (tmp_path / "c-1.txt").symlink_to("nowhere")
    samples.write_all({paths[0]: "old", paths[1]: "new", paths[2]: "new"}, beside)
    assert [path.read_text() for path in paths] == ["old", "new", "new"]
    kept = {path.name for path in tmp_path.iterdir()} - {path.name for path in paths}
    assert kept == {"a-2.txt", "b.1-2.txt", "c-1.txt", "score-2.txt"}


def test_a_model_with_sft_in_the_name_it_is_given_is_asked_as_the_course_asks(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("The sky")
    samples.main(["--checkpoint", "tiny-gpt2", "--kind", "completions", "--layers", "1",
                  "--inputs", str(tmp_path / "in.txt"), "--out-dir", str(tmp_path),
                  "--name", "phi-sft", "--samples", "1"])  # fmt: skip
    text = (tmp_path / "output_shakespeare_completions_phi-sft.txt").read_text()
    assert "The sky <complete>\n" in text and "asked as the course asks" in capsys.readouterr().out


def test_all_methods_see_samples_of_one_length(capsys):
    cut = compare_methods.longest_sample
    assert cut(1024, 30, ["lora", "prefix_tuning"], 1024) == 994
    assert "30 of the context of 1024 are virtual in prefix_tuning" in capsys.readouterr().out
    assert cut(1024, 30, ["lora", "full"], 1024) == 1024 and cut(1024, 30, ["lora"], 512) == 512
    assert cut(512, 20, ["prompt_tuning"], 1024) == 512
    assert cut(512, 20, ["prompt_tuning"], 512) == 492


def test_the_same_number_of_references_as_inputs_is_asked_for(tmp_path):
    (tmp_path / "in.txt").write_text("one\n\ntwo\n")
    (tmp_path / "ref.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(UserError, match="references for 2 inputs"):
        samples.main(["--kind", "summaries", "--inputs", str(tmp_path / "in.txt"),
                      "--references", str(tmp_path / "ref.txt"), "--layers", "1"])  # fmt: skip


@pytest.mark.parametrize("flags", [
    ["--methods", "lora,magic"], ["--methods", "lora", "--lrs", "full=1e-3"],
    ["--lrs", "lora=fast"], ["--lrs", "lora=-1"], ["--lrs", "lora=1e-3:2e-3"],
    ["--checkpoint", "nowhere"], ["--train-flags", '--template "x'], ["--seeds", "0,1,0"],
    ["--methods", "lora,prefix_tuning", "--train-flags", "--virtual-tokens 600"],
    ["--train-flags", "--data other.csv"], ["--train-flags", "--task tldr"],
    ["--train-flags", "--learning_rate=5"], ["--train-flags", "--no-save"],
    ["--train-flags", "--out-dir elsewhere"], ["--train-flags", "--dry-run"],
    ["--train-flags", "--resume"],
    ["--train-flags", "--config run.json"],
])  # fmt: skip
def test_a_comparison_refuses_what_it_cannot_do_before_its_first_run(flags, tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text('{"data": "other.csv"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        compare_methods.main(["--out-dir", str(tmp_path / "c"), *flags])
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["tiny-gpt2", "tiny-llama"])
def test_a_comparison_fills_its_report_and_resumes_cell_by_cell(checkpoint, tmp_path):
    folder = tmp_path / "c"
    command = ["--out-dir", str(folder), "--checkpoint", checkpoint, "--methods", "bitfit,lora",
               "--grid", "bitfit=1e-3:1e30", "--lrs", "lora=2e-3", "--search-steps", "1",
               "--test-samples", "4", "--max-new-tokens", "8", "--train-flags",
               "--samples 8 --held-out 4 --batch-size 4 --accumulation-steps 1"]  # fmt: skip
    results = compare_methods.main(command)
    assert [len(runs) for runs in results.values()] == [2, 2]
    for runs in results.values():
        assert runs[0]["report"]["loss"] != runs[1]["report"]["loss"]  # another seed
        for run in runs:
            means = {kind: statistics.fmean(scores) for kind, scores in run["rouge"].items()}
            told = {kind: found["mean"] for kind, found in run["report"]["rouge"].items()}
            assert means == pytest.approx(told) and run["report"]["n"] == 4
    names = {path.name for path in folder.iterdir()}
    assert {"report.md", "table.csv", "loss.png", "rouge.png", "cost.png"} <= names
    assert "diverged" in (folder / "report.md").read_text()
    rows = [*csv.DictReader((folder / "table.csv").open())]
    assert [row["method"] for row in rows][-3:] == ["no tuning", "bitfit", "lora"]
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*-seed*.json")}
    assert compare_methods.main(command) == results
    assert done == {path: path.stat().st_mtime_ns for path in folder.glob("*-seed*.json")}


def test_a_single_flag_is_a_value_of_train_flags():
    command = ["--out-dir", "c", "--train-flags", "--skip-bad", "--search-steps", "9"]
    args = compare_methods.parse_args(command)
    assert args.train_flags == "--skip-bad" and args.search_steps == 9


@pytest.mark.parametrize("flags", [
    ["--max-length", "9"], ["--max-length=9"], ["--max-length", "8", "--max_length=9"],
    ["--config", "run.json"], ["--config", "run.json", "--lr", "1"],
])  # fmt: skip
def test_a_flag_of_every_run_is_known_however_it_is_written(flags, tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text('{"max-length": 9}')
    monkeypatch.chdir(tmp_path)
    assert parse_training(FAMILIES[0], flags).max_length == 9


def test_the_untuned_model_is_cut_and_asked_as_the_tuned_ones():
    assert compare_methods.of_model(2, "mine.json") == ["--layers", "2", "--template", "mine.json"]
    assert compare_methods.of_model(None, None) == []


def test_samples_are_drawn_as_asked_each_input_from_a_stream_of_its_own(tmp_path):
    (tmp_path / "in.txt").write_text("The cat sat\nThe sky\n")
    how = {"temperature": 0.9, "top_k": 30, "repetition_penalty": 1.1}
    written = samples.main([
        "--checkpoint", "tiny-gpt2", "--kind", "completions", "--inputs", str(tmp_path / "in.txt"),
        "--out-dir", str(tmp_path), "--samples", "2", "--layers", "1", "--seed", "5",
        *(word for flag, value in how.items() for word in (f"--{flag}", str(value))),
    ])  # fmt: skip
    model, tokenizer = load_gpt2(TINY_GPT2, n_layers=1)
    for i, text in enumerate(("The cat sat", "The sky")):
        tokens = tokenizer.encode(text, bos=True)
        new = library_generate(model.eval(), [tokens] * 2, 101 - len(tokens), seed=5 + 2 * i,
                               eos_id=tokenizer.eos_id, **how)  # fmt: skip
        ended = [[t for t in row if t != tokenizer.eos_id] for row in new]
        assert written[i] == [tokenizer.decode(row).strip() for row in ended]


def test_a_summary_ends_at_the_next_cue_and_has_room_however_long_the_post(capsys):
    model, tokenizer = load_gpt2(TINY_GPT2, n_layers=1)
    sample = ask_about_post(f"SUBREDDIT: r/a TITLE: b POST: {'a word ' * 600}TL;DR:", None)
    how = {"temperature": 0.0, "top_k": None, "repetition_penalty": 1.0}
    asked = shorten(sample, tokenizer, model.config.max_seq_len - samples.NEW_TOKENS)
    tokens = tokenizer.encode(asked.prompt, bos=True)
    (new,) = library_generate(model.eval(), [tokens], samples.NEW_TOKENS, eos_id=tokenizer.eos_id)
    text = tokenizer.decode([t for t in new if t != tokenizer.eos_id]).strip()
    (fitting,), _ = samples.fit([sample], tokenizer, model.config.max_seq_len)
    assert "1 of 1 posts shortened" in capsys.readouterr().out and fitting == asked
    assert samples.write_samples(model, tokenizer, fitting, "summaries", 1, 0, how) == [
        until_next_cue(text)
    ]
    assert until_next_cue("a hen TL;DR: b") == "a hen"


def test_posts_in_another_form_are_counted(tmp_path, capsys):
    path = tmp_path / "in.txt"
    found = ask_about_post("SUBREDDIT: r/a TITLE: REPOST: b POST: c TL;DR:", TEMPLATES["tldr"])
    assert "TITLE: REPOST: b\n" in found.prompt and found.prompt[found.body.start :][0] == "c"
    of_course = "SUBREDDIT: r/a TITLE: b POST: c TL;DR:\n\nSUBREDDIT: r/a TITLE: POST: d TL;DR:"
    path.write_text(f"{of_course}\n\nNora saw a hare.\n\nSo did Tom.")
    assert len(samples.read_inputs("summaries", path, None)) == 4
    assert f"{path}: 2 of 4 posts (the first is number 3)" in capsys.readouterr().err
    samples.read_inputs("completions", path, None)
    assert not capsys.readouterr().err


def test_a_score_is_the_mean_of_the_sets_in_the_posts_order(tmp_path):
    """Three posts, two samples of each: a set has three, and its references their own order."""
    pytest.importorskip("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    (tmp_path / "in.txt").write_text("\n\n".join(f"Nora {word}" for word in ["ran", "sat", "saw"]))
    references = ["She was running.", "Tom and she", "a hare and the sky in the morning"]
    (tmp_path / "ref.txt").write_text("\n".join(references))
    written = samples.main([
        "--checkpoint", "tiny-gpt2", "--kind", "summaries", "--inputs", str(tmp_path / "in.txt"),
        "--references", str(tmp_path / "ref.txt"), "--out-dir", str(tmp_path), "--samples", "2",
    ])  # fmt: skip
    scorer = RougeScorer(["rouge1"], use_stemmer=False)
    scores = [scorer.score(reference, text)["rouge1"].fmeasure
              for texts, reference in zip(written, references, strict=True) for text in texts]
    told = (tmp_path / "output_rouge_score_tiny-gpt2.txt").read_text().splitlines()[-1]
    assert float(told.rpartition(" ")[2]) == pytest.approx(statistics.fmean(scores))
    about = json.loads((tmp_path / "output_reddit_summaries_tiny-gpt2.json").read_text())
    assert about["rouge1"]["mean"] == pytest.approx(statistics.fmean(scores)) and any(scores)
    settings = about["settings"]
    assert (settings["top-k"], settings["temperature"], settings["posts shortened"]) == (50, 0.2, 0)
    assert not any("_" in name for name in settings)


@pytest.mark.parametrize("script", [finetune_llama, finetune_gpt2, finetune_phi, dpo],
                         ids=lambda module: module.__name__)  # fmt: skip
def test_every_script_logs_its_steps_keeps_the_last_weights_and_tries_dry(script, tmp_path, capsys):
    task = [] if script is dpo else ["--task", "alpaca"]
    flags = [*task, "--layers", "1", "--samples", "12", "--held-out", "4", "--batch-size", "2",
             "--accumulation-steps", "3", "--max-iters", "2", "--lr", "1e-3",
             "--out-dir", str(tmp_path / "run")]  # fmt: skip
    assert script.main([*flags, "--dry-run"]) is None and not (tmp_path / "run").exists()
    script.main([*flags, "--keep-last"])
    assert (tmp_path / "run" / "adapter_last").exists()
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    rows = 4 if script is dpo else 2  # of a pair there are two
    assert f" in 3 forwards of {rows}, " in capsys.readouterr().out
    script.main([*flags, "--resume"])
    assert "adapter_last: of an earlier end of this run" in capsys.readouterr().err


def test_held_out_pairs_of_prompts_that_are_trained_on_are_told(tmp_path, capsys):
    for split, answer in (("train", "a hen"), ("validation", "a hare"), ("test", "a goat")):
        rows = [{"prompt": f"Who is {i}?", "chosen": answer, "rejected": "no"} for i in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dpo.main(["--data", str(tmp_path), "--layers", "1", "--dry-run"])
    assert "4 of 4 held-out samples have a prompt that is trained on" in capsys.readouterr().out


def test_the_courses_numbers_are_the_defaults():
    args = [script.parse_args([]) for script in (finetune_llama, finetune_gpt2, finetune_phi)]
    assert [a.batch_size * a.accumulation_steps for a in args] == [8, 128, 8]
    assert [a.samples for a in args] == [200, 5000, 5000]


def test_the_dropout_of_gpt2_is_the_one_asked_for(tmp_path):
    flags = ["--layers", "1", "--samples", "8", "--held-out", "4", "--max-iters", "1",
             "--lora-dropout", "0", "--no-save", "--out-dir"]  # fmt: skip
    for dropout in ("0", "0.5"):
        finetune_gpt2.main([*flags, str(tmp_path / dropout), "--dropout", dropout])
    first = [read_metrics(tmp_path / d / "metrics.jsonl")[0]["loss"] for d in ("0", "0.5")]
    assert first[0] != first[1]
