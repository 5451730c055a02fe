"""Measures a model's accuracy on a task with labels, two ways, with how sure one can be.

    python tools/evaluate.py --adapter runs/finetune-gpt2-001/adapter
    python tools/evaluate.py --checkpoint gpt2-medium --data rotten_tomatoes/ --template reviews
    python tools/evaluate.py --checkpoint runs/finetune-gpt2-002/model --split validation

By generation: what the model writes after the prompt must be a label and nothing else; anything
else counts as wrong, and its share is told. By likelihood: the label the model finds likelier.
Writes results.json and predictions.json to --out-dir.
"""

from pathlib import Path

from minillm.cli import Parser, positive, settings_of, whole
from minillm.data.samples import SPLITS
from minillm.data.tasks import TASKS
from minillm.data.templates import find_template
from minillm.errors import UserError, friendly_errors
from minillm.files import write_json
from minillm.metrics import classification_report, describe
from minillm.predict import GENERATION, LIKELIHOOD, predict_labels
from tools.models import add_adapted_model_flags, load_model

LABELLED = [name for name, task in TASKS.items() if task.labels]


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_adapted_model_flags(parser)
    add = parser.add_argument_group("data").add_argument
    add("--task", choices=LABELLED, default=LABELLED[0], help="what the data is")
    add("--data", help="the task's official file or folder (default: tinyworld's stand-in)")
    add("--split", choices=SPLITS, default="test", help="which part of it (default: test)")
    add("--samples", type=positive, help="only the first N of the split")
    add = parser.add_argument_group("prediction").add_argument
    add("--by", choices=[GENERATION, LIKELIHOOD, "both"], default="both")
    add("--batch-size", type=positive, default=32, help="prompts in a batch")
    add("--max-new-tokens", type=positive, default=5, help="tokens written for a label")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, help="draw from the k likeliest tokens")
    add("--seed", type=whole, default=0)
    add("--out-dir", help="where to write the files (default: in the adapter's or model's folder)")
    return parser.parse_args(argv)


def read_split(task: str, data: str | None, split: str, template, n: int | None):
    """The samples of one split, asked in the template's words. Errors: UserError if it is empty."""
    kind = TASKS[task]
    template = (template or find_template(kind.template)).check_field(kind.field)
    splits = kind.read(data, template) if data else kind.tinyworld(1, 1, template)
    samples = getattr(splits, split)[:n]
    if not samples:
        raise UserError(f"{data or 'tinyworld'}: no {split} split; choose another --split")
    return samples


def course_files(folder: Path, samples, answers, report: dict, settings: dict) -> None:
    """results.json and predictions.json, with the keys that the course's script writes too."""
    predicted = [answer.label for answer in answers]
    write_json(folder / "results.json", {
        "pos_counter": predicted.count(1), "neg_counter": predicted.count(0),
        "accuracy": report["accuracy"], "counter": len(samples), "report": report,
        "settings": settings,
    })  # fmt: skip
    write_json(folder / "predictions.json", [
        {"response": answer.answer, "true label": sample.label, "predicted label": answer.label}
        for sample, answer in zip(samples, answers, strict=True)
    ])  # fmt: skip


def main(argv=None) -> dict:
    args = parse_args(argv)
    model, tokenizer, template = load_model(
        args.checkpoint, args.adapter, args.layers, args.tokenizer, args.template,
        args.device, args.precision, args.force,
    )  # fmt: skip
    model.attention = args.attention
    labels = TASKS[args.task].labels
    samples = read_split(args.task, args.data, args.split, template, args.samples)
    reports = {}
    print(f"{len(samples)} samples of {args.split}; the first prompt: {samples[0].prompt!r}")
    for by in (GENERATION, LIKELIHOOD):
        if args.by not in (by, "both"):
            continue
        answers = predict_labels(
            model, tokenizer, samples, labels, by, args.batch_size, args.max_new_tokens,
            args.seed, temperature=args.temperature, top_k=args.top_k,
        )  # fmt: skip
        truth = [sample.label for sample in samples]
        report = classification_report([a.label for a in answers], truth, labels)
        reports[by] = report
        print(f"by {by}: {describe(report)}")
        for name, row in zip(labels, report["confusion"], strict=True):
            told = ", ".join(f"{n} {w}" for n, w in zip(row, [*labels, "none"], strict=True))
            print(f"  truly {name}: predicted {told}")
        source = args.adapter or args.checkpoint
        folder = Path(args.out_dir or (source if source and Path(source).is_dir() else "."))
        folder = folder / f"evaluation-{args.split}" / by
        folder.mkdir(parents=True, exist_ok=True)
        course_files(folder, samples, answers, report, settings_of(args))
        print(f"  wrote {folder}/results.json and predictions.json")
    return reports


if __name__ == "__main__":
    with friendly_errors():
        main()
