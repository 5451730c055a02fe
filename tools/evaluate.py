"""Measures a model on a task: labels two ways, texts by loss and ROUGE, with how sure one can be.

    python tools/evaluate.py --adapter runs/finetune-gpt2-001/adapter
    python tools/evaluate.py --checkpoint gpt2-medium --data rotten_tomatoes/ --template reviews
    python tools/evaluate.py --init-from resume --out-dir runs/finetune-gpt2-001
    python tools/evaluate.py --adapter runs/x/adapter --task cnn_dailymail --data cnn_dailymail/

Labels by generation: what the model writes after the prompt must be a label and nothing else;
anything else counts as wrong, and its share is told. By likelihood: the label the model finds
likelier. Texts: loss per token of the reference, then what the model writes freely, held against
the reference (summaries) or the training text (passages), with baselines beside it.
Writes results.json and predictions.json to OUT_DIR/evaluation-SPLIT/, a folder for each way; other
results that are there already are kept beside, under a number.
"""

import contextlib
import json
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from minillm.cli import Parser, pick, positive, settings_of
from minillm.data.samples import SPLITS
from minillm.data.tasks import TASKS, Task
from minillm.data.templates import Template, find_template
from minillm.errors import UserError, friendly_errors
from minillm.evaluation import answer_room, loss_report, text_report, write_answers
from minillm.files import read_json, set_aside, write_json
from minillm.hub import find_checkpoint
from minillm.metrics import classification_report, describe
from minillm.peft_format import read_notes
from minillm.predict import GENERATION, LIKELIHOOD, predict_labels
from minillm.sampling import Sampling
from minillm.text_metrics import ROUGE
from tools.models import (
    ModelOptions,
    add_adapted_model_flags,
    add_sampling_flags,
    kept_by,
    load_model,
    sampling_of,
)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_adapted_model_flags(parser)
    add = parser.add_argument_group("data").add_argument
    add("--task", choices=[*TASKS],
        help="what the data is (default: that of its training, else rotten_tomatoes)")  # fmt: skip
    add("--data", help="the task's official file or folder, or tinyworld for its stand-in "
        "(default: that of its training, if it was of this task, else tinyworld)")  # fmt: skip
    add("--skip-bad", action="store_true", help="leave out broken rows of --data, and count them")
    add("--split", choices=SPLITS, help="which part of it (default: test, or validation where the "
        "task has no test)")  # fmt: skip
    add("--samples", type=positive, help="only the first N of the split")
    add("--max-length", type=positive, help="tokens of a sample, and of a prompt with its answer; "
        "articles are shortened to it, as in training (default: as there, else 512)")  # fmt: skip
    add = parser.add_argument_group("prediction").add_argument
    add("--by", choices=[GENERATION, LIKELIHOOD, "both"], default="both", help="labels only")
    add("--batch-size", type=positive, default=32, help="prompts in a batch")
    add("--out-dir", help="where to write the files (default: in the adapter's or "
        "model's folder, where one is named by its path, else here)")  # fmt: skip
    add_sampling_flags(parser, None)
    args = parser.parse_args(argv)
    if args.checkpoint == "resume":
        if args.out_dir is None:
            raise UserError("--init-from resume: no run is named; add --out-dir FOLDER")
        flag, kept = kept_by(Path(args.out_dir))
        is_model = flag == "--checkpoint"
        args.checkpoint, args.adapter = (str(kept), None) if is_model else (None, str(kept))
    trained = settings_of_training(args.adapter, args.checkpoint)
    if args.data == "tinyworld":
        args.data = None
    elif args.data is None and args.task in (None, trained.get("task")):
        args.data = trained.get("data")
    args.task = args.task or trained.get("task", "rotten_tomatoes")
    tell_idle(parser, vars(args))
    args.max_length = args.max_length or trained.get("max-length", 512)
    return args


def tell_idle(parser: Parser, flags: dict) -> None:
    """Names the flags that do nothing with this task, or this way of predicting."""
    task, by = flags["task"], flags["by"]
    idle = {"by": f"{task} has no labels"}
    if TASKS[task].labels:
        idle = {"max_length": f"{task} has labels, whose prompts stay whole"}
    if TASKS[task].labels and by == LIKELIHOOD:
        names = ("max_new_tokens", *(field.name for field in fields(Sampling)), "seed")
        idle |= dict.fromkeys(names, "nothing is written by likelihood")
    for name, why in idle.items():
        if flags[name] != parser.own_default(name):
            flag = name.replace("_", "-")
            print(f"warning: --{flag}: {why}; no effect", file=sys.stderr)
    if flags["template"] == "none":
        print(f"warning: --template none: {task} is asked in the words of "
              f"{TASKS[task].template!r}", file=sys.stderr)  # fmt: skip


def settings_of_training(adapter: str | None, checkpoint: str | None) -> dict:
    """The flags of the run that left an adapter or a model, {} where they are not known."""
    found = None
    with contextlib.suppress(UserError):  # what is wrong is told when it is loaded
        kept = adapter or (checkpoint and find_checkpoint(checkpoint))
        found = read_notes(Path(kept)).get("settings") if kept else None
    is_sound = isinstance(found, dict) and found.get("task") in TASKS and isinstance(
        found.get("max-length", 1), int)  # fmt: skip
    return found if is_sound else {}


TRAINING_SAMPLES = 2000  # of tinyworld's stand-in, to look for copies of


def read_data(
    task: str, data: str | None, split: str, template: Template, n: int | None, skip_bad: bool
):
    """The samples of one split, asked in the template's words, and the training text if the task
    is compared with it. `skip_bad` leaves out broken rows, and says how many. Errors: UserError if
    the split is empty."""
    kind = TASKS[task]
    if data is None and split != "test" and kind.has_test and not kind.labels:
        raise UserError(f"--split {split}: of tinyworld's stand-in for {task} only the test split "
                        "is the same in every run; give --data, or measure on test")  # fmt: skip
    n_train = TRAINING_SAMPLES if kind.compare_with_training else 1
    # more held out than test samples would move the stand-ins' test split into what was trained on
    n_held_out = 1 if kind.has_test else n or 100
    splits = kind.splits(data, template, n_train, n_held_out, skip_bad, n)
    samples = getattr(splits, split)[:n]
    if not samples:
        raise UserError(f"{data or 'tinyworld'}: no {split} split; choose another --split")
    known = "\n".join(sample.row for sample in splits.train) if kind.compare_with_training else None
    return samples, known


def measure_labels(model, tokenizer, samples, labels, by: str, settings: dict, **how):
    """The report of one way of predicting, and what goes into the two files (with the keys that
    the course's script writes too)."""
    answers = predict_labels(model, tokenizer, samples, labels, by, **how)
    predicted = [answer.label for answer in answers]
    report = classification_report(predicted, [sample.label for sample in samples], labels)
    print(f"by {by}: {describe(report)}")
    for name, row in zip(labels, report["confusion"], strict=True):
        told = ", ".join(f"{n} {w}" for n, w in zip(row, [*labels, "none"], strict=True))
        print(f"  truly {name}: predicted {told}")
    results = {
        "pos_counter": predicted.count(1), "neg_counter": predicted.count(0),
        "accuracy": report["accuracy"], "counter": report["correct"], "report": report,
        "settings": settings,
    }  # fmt: skip
    rows = [
        {"text": sample.row, "response": answer.answer, "true label": sample.label,
         "predicted label": answer.label}
        for sample, answer in zip(samples, answers, strict=True)
    ]
    return report, results, rows


def measure_texts(
    model, tokenizer, samples, task: Task, known: str | None, max_length: int, settings: dict, **how
):
    """The report of a task whose answers are texts, and what goes into the two files."""
    answers = write_answers(model, tokenizer, samples, max_length=max_length, **how)
    report = loss_report(model, tokenizer, samples, max_length, how["batch_size"])
    report |= text_report(task, samples, answers, known)
    print(f"{report['samples']}\nloss {report['loss']:.4f} nats per token, perplexity "
          f"{report['perplexity']:.3f}")  # fmt: skip
    print(f"{report['n']} answers: {report['stopped_share']:.1%} ended by themselves, "
          f"{report['mean_tokens']:.1f} tokens on average, {report['distinct_2']:.1%} of their "
          "word pairs differ")  # fmt: skip
    scores = {"model": report.get("rouge"), **report.get("baselines", {})}
    for name, found in scores.items():
        if found:
            told = (f"{kind.removeprefix('rouge')} {100 * found[kind]['mean']:.2f} "
                    f"({100 * found[kind]['interval_95'][0]:.2f} to "
                    f"{100 * found[kind]['interval_95'][1]:.2f})" for kind in ROUGE)  # fmt: skip
            print(f"ROUGE of {name}: {', '.join(told)}")
    if known is not None:
        print(f"longest piece shared with the training text ({len(report['longest_shared'])} "
              f"characters): {report['longest_shared']!r}")  # fmt: skip
    rows = [
        {"prompt": sample.prompt, "response": answer.text, "reference": sample.response.strip(),
         "stopped": answer.stopped}
        for sample, answer in zip(samples, answers, strict=True)
    ]  # fmt: skip
    return report, {"report": report, "settings": settings}, rows


def is_other(folder: Path, results: dict, rows: list[dict]) -> bool:
    """Whether other results than these are in a folder, whatever settings they are of."""
    found = [{**results, "settings": None}, rows]
    try:
        known = [read_json(folder / f"{name}.json") for name in ("results", "predictions")]
        return [{**known[0], "settings": None}, known[1]] != json.loads(json.dumps(found))
    except (UserError, TypeError):  # not readable, or no results
        return True


def main(argv=None) -> dict:
    args = parse_args(argv)
    options, sampling = pick(ModelOptions, vars(args)), sampling_of(vars(args))
    model, tokenizer, template = load_model(options)
    task, settings = TASKS[args.task], settings_of(args)
    template = (template or find_template(task.template)).check_field(task.field)
    split = args.split or ("test" if task.has_test else "validation")
    samples, known = read_data(args.task, args.data, split, template, args.samples, args.skip_bad)
    print(f"{options.name} on {args.task}, {args.data or 'tinyworld'}: {len(samples)} samples of "
          f"{split}; the first prompt: {samples[0].prompt!r}")  # fmt: skip
    n_new = task.answer_tokens if args.max_new_tokens is None else args.max_new_tokens
    if args.max_new_tokens is None and not task.labels:
        n_new = answer_room(tokenizer, samples, model.config.max_seq_len, n_new)
        why = ": the longest prompt leaves no room for more" if n_new < task.answer_tokens else ""
        print(f"answers of up to {n_new} tokens{why}")
    how = {
        "batch_size": args.batch_size, "max_new_tokens": n_new, "seed": args.seed,
        **asdict(sampling),
    }  # fmt: skip
    settings |= {name.replace("_", "-"): value for name, value in how.items()} | {
        "split": split, "template": template.to_dict(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip
    source = args.adapter or args.checkpoint
    folder = Path(args.out_dir or (source if source and Path(source).is_dir() else "."))
    ways = {by: partial(measure_labels, labels=task.labels, by=by)
            for by in (GENERATION, LIKELIHOOD) if args.by in (by, "both")}  # fmt: skip
    if not task.labels:
        ways = {"text": partial(measure_texts, task=task, known=known, max_length=args.max_length)}
    reports = {}
    for by, measure in ways.items():
        reports[by], results, rows = measure(model, tokenizer, samples, settings=settings, **how)
        out = folder / f"evaluation-{split}" / by
        if out.exists() and is_other(out, results, rows):
            set_aside(out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", results)
        write_json(out / "predictions.json", rows)
        print(f"  wrote {out}/results.json and predictions.json")
    return reports


if __name__ == "__main__":
    with friendly_errors():
        main()
