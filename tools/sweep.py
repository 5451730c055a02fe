"""The course's tables in one go: LoRA ranks, full fine-tuning, alpha, and prompts, compared.

    python tools/sweep.py --out-dir runs/sweep                          bundled model, on a laptop
    python tools/sweep.py --out-dir runs/medium --init-from gpt2-medium --data rotten_tomatoes/

Every cell is a run of train/finetune_gpt2.py in a process of its own, then measured on the test
split by generation, with the checkpoint that was best on validation and with the last one. A cell
that is done is not done again: run the same command after an interruption. Writes report.md,
table.csv, accuracy.png and loss.png. `--train-flags "--epochs 4 --lr 1e-3"` goes to every run,
`--full-flags` after it to full fine-tuning, which wants a lower learning rate than LoRA; the
bundled model has its own of both (train/tiny_gpt2.json).
"""

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from minillm.cli import Parser, positive, settings_of
from minillm.errors import UserError, friendly_errors
from minillm.files import read_json, write_json
from minillm.hub import find_checkpoint
from minillm.metrics import paired_test
from minillm.plots import plot_accuracies, plot_held_out
from minillm.runs import read_metrics
from tools import evaluate

SCRIPT = Path(__file__).parent.parent / "train" / "finetune_gpt2.py"
TINY_FLAGS = ["--config", str(SCRIPT.with_name("tiny_gpt2.json"))]
TINY_FULL_FLAGS, FULL_FLAGS = "--lr 1e-3 --dropout 0.05", "--lr 5e-5 --dropout 0.05"
CHECKPOINTS = ("best", "last")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out-dir", required=True, help="folder of the sweep; its cells are folders in it")
    add("--checkpoint", "--init-from", metavar="NAME|PATH", help="base (default: tiny-gpt2)")
    add("--data", help="Rotten Tomatoes' files (default: tinyworld's reviews)")
    add("--ranks", default="16,128,196", help="LoRA ranks, with alpha four times the rank")
    add("--templates", default="reviews,reviews-short",
        help="prompts: the first for all cells, the others also at the middle rank")  # fmt: skip
    add("--train-flags", default="", help="flags for every run of finetune_gpt2.py")
    add("--full-flags", help=f"flags for full fine-tuning (default: {FULL_FLAGS}, or "
        f"{TINY_FULL_FLAGS} for the bundled model)")  # fmt: skip
    add("--test-samples", type=positive, help="measure on the first N of the test split")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


def plan(ranks: list[int], templates: list[str], full_flags: list[str]) -> dict[str, list[str]]:
    """The flags of each cell, by its title: the rows of the course's three tables."""

    def lora(rank: int, alpha: int, template: str = templates[0]) -> list[str]:
        return ["--rank", str(rank), "--alpha", str(alpha), "--template", template]

    middle = ranks[len(ranks) // 2]
    cells = {f"LoRA r {rank}, alpha {4 * rank}": lora(rank, 4 * rank) for rank in ranks}
    cells["full fine-tuning"] = ["--rank", "0", "--template", templates[0], *full_flags]
    cells[f"LoRA r {ranks[0]}, alpha {16 * ranks[0]}"] = lora(ranks[0], 16 * ranks[0])
    for template in templates[1:]:
        cells[f"LoRA r {middle}, prompt {template}"] = lora(middle, 4 * middle, template)
    return cells


def run_cell(folder: Path, flags: list[str]) -> None:
    """Trains one cell, continuing what is there. Errors: UserError with the script's own line."""
    if (folder / "metrics.jsonl").exists():
        flags = [*flags, "--resume"]
    command = [sys.executable, str(SCRIPT), "--out-dir", str(folder), "--keep-last", *flags]
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
        reason = lines[-1].removeprefix("error: ") if lines else done.stderr[-300:]
        raise UserError(f"{folder}: the run failed: {reason}")


def measure(source: list[str], folder: Path, common: list[str]) -> dict:
    """Test accuracy by generation, and which rows were right. Errors: UserError."""
    report = evaluate.main([*source, *common, "--by", "generation", "--out-dir", str(folder)])
    rows = read_json(folder / "evaluation-test" / "generation" / "predictions.json")
    right = [row["true label"] == row["predicted label"] for row in rows]
    return {"report": report["generation"], "right": right}


def cell_results(folder: Path, common: list[str]) -> dict:
    """What one trained cell scores with its best and its last checkpoint, and what it trained."""
    kind, flag = ("model", "--checkpoint") if (folder / "model").exists() else (
        "adapter", "--adapter")  # fmt: skip
    rows = read_metrics(folder / "metrics.jsonl")
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    results = {"best": measure([flag, str(folder / kind)], folder / kind, common)}
    results["last"] = results["best"]  # the same weights, if the last evaluation was the best
    if min(held_out) != rows[-1]["held_out_loss"]:
        last = folder / f"{kind}_last"
        results["last"] = measure([flag, str(last)], last, common)
    return results | {"steps": len(rows), "best_held_out_loss": min(held_out)}


def write_report(folder: Path, results: dict[str, dict], settings: dict) -> None:
    """report.md and table.csv: a row per cell and checkpoint, with a paired test against the
    first trained cell's same checkpoint."""
    first = next(title for title in results if title != "no tuning")
    header = ["cell", "checkpoint", "accuracy", "95 % low", "95 % high", "unparseable",
              "best held-out loss", "p against first"]  # fmt: skip
    rows = []
    for title, result in results.items():
        for checkpoint in CHECKPOINTS:
            if checkpoint not in result:
                continue
            report, right = result[checkpoint]["report"], result[checkpoint]["right"]
            test = paired_test(right, results[first][checkpoint]["right"])
            p = "" if title == first else f"{test['p_value']:.3g}"
            loss = result.get("best_held_out_loss")
            rows.append([title, checkpoint, *(f"{v:.4f}" for v in (
                report["accuracy"], *report["interval_95"], report["unparseable_share"])),
                "" if loss is None else f"{loss:.4f}", p])  # fmt: skip
    n = results[first]["best"]["report"]
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(r) for r in rows)]
    note = (
        f"Test split, n = {n['n']}; always giving the commonest label scores "
        f"{n['majority_baseline']:.4f}. Accuracy by generation, greedy: anything but a label "
        "counts as wrong. Intervals: Wilson, 95 %. p: McNemar's exact test, same rows, against "
        f'"{first}", same checkpoint; one seed each, so it says nothing about other seeds.\n'
        "best: the checkpoint with the lowest held-out loss; last: the last step's."
    )
    table = "\n".join(f"| {line} |" for line in lines)
    text = f"# Sweep\n\n{note}\n\n{table}\n\n```\n{json.dumps(settings, indent=1)}\n```\n"
    (folder / "report.md").write_text(text)


def main(argv=None) -> dict[str, dict]:
    args = parse_args(argv)
    folder, templates = Path(args.out_dir), args.templates.split(",")
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(args)
    if (folder / "sweep.json").exists() and read_json(folder / "sweep.json") != settings:
        raise UserError(f"{folder}: a sweep with other settings; name another --out-dir")
    write_json(folder / "sweep.json", settings)
    try:
        ranks = [int(rank) for rank in args.ranks.split(",")]
    except ValueError:
        raise UserError(f"--ranks {args.ranks}: whole numbers with commas between") from None
    data = ["--data", args.data] if args.data else []
    common = [*data, "--device", args.device]
    measured = [*common, *(["--samples", str(args.test_samples)] if args.test_samples else [])]
    base = ["--checkpoint", args.checkpoint or "tiny-gpt2"]
    is_tiny = find_checkpoint(base[1]) == find_checkpoint("tiny-gpt2")
    train_flags = [*(TINY_FLAGS if is_tiny else []), *common, *shlex.split(args.train_flags)]
    full_flags = args.full_flags or (TINY_FULL_FLAGS if is_tiny else FULL_FLAGS)
    cells = plan(ranks, templates, shlex.split(full_flags))
    results: dict[str, dict] = {}
    for number, title in enumerate(tqdm(["no tuning", *cells], desc="cells", unit="cell")):
        done = folder / f"cell-{number}.json"
        if not done.exists():
            cell = folder / f"cell-{number}"
            if title == "no tuning":
                untuned = [*base, "--template", templates[0]]
                result = {"best": measure(untuned, cell, measured)}
            else:
                run_cell(cell, [*base, *train_flags, *cells[title]])
                result = cell_results(cell, measured)
            write_json(done, result | {"title": title}, indent=None)
        results[title] = read_json(done)
    write_report(folder, results, settings)
    plot_accuracies(results, folder / "accuracy.png")
    curves = {t: read_metrics(folder / f"cell-{i}" / "metrics.jsonl")
              for i, t in enumerate(cells, 1)}  # fmt: skip
    plot_held_out(curves, folder / "loss.png")
    print((folder / "report.md").read_text())
    return results


if __name__ == "__main__":
    with friendly_errors():
        main()
