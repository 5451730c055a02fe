"""What tools/sweep.py writes: a row per cell and checkpoint with paired tests, and pictures."""

import re
import statistics
from pathlib import Path

from minillm.metrics import paired_test
from minillm.plots import plot_accuracies, plot_held_out
from minillm.runs import read_metrics
from tools.cells import write_report

CHECKPOINTS = ("best", "last")


def seed_in(title: str) -> str:
    """The end of a cell's title that names its seed, if one does."""
    return "".join(re.findall(r", seed \d+$", title))


def table(results: dict[str, dict]) -> list[dict]:
    """A row per cell and checkpoint, with a paired test against the same checkpoint of the first
    cell (of the same seed); then, of several seeds, a row for their mean."""
    first: dict[str, str] = {}  # the first cell of each seed
    for title in [*results][1:]:
        first.setdefault(seed_in(title), title)
    rows = []
    for title, result in results.items():
        against = first.get(seed_in(title), [*results][1])
        for checkpoint in CHECKPOINTS:
            if checkpoint not in result:
                continue
            report, right = result[checkpoint]["report"], result[checkpoint]["right"]
            p = paired_test(right, results[against][checkpoint]["right"])["p_value"]
            low, high = report["interval_95"]
            rows.append({
                "cell": title, "checkpoint": checkpoint, "accuracy": f"{report['accuracy']:.2%}",
                "95 % interval": f"{low:.2%} to {high:.2%}",
                "unparseable": f"{report['unparseable_share']:.2%}",
                "p against first": None if title == against else "< 1e-6" if p < 1e-6 else p,
                "scale": result.get("scale"), "trainable": result.get("trainable"),
                "lr": result.get("lr"), "steps": result.get("steps"),
                "best held-out loss": result.get("best held-out loss"),
            })  # fmt: skip
    return rows + (means(results) if len(first) > 1 else [])


def means(results: dict[str, dict]) -> list[dict]:
    """A row per cell and checkpoint: the mean accuracy of its seeds, and from where to where they
    go."""
    found: dict[tuple[str, str], list[float]] = {}
    for title, result in [*results.items()][1:]:
        for checkpoint in CHECKPOINTS:
            cell = title.removesuffix(seed_in(title))
            accuracy = result[checkpoint]["report"]["accuracy"]
            found.setdefault((cell, checkpoint), []).append(accuracy)
    return [{"cell": f"{cell}, mean of {len(all_)} seeds", "checkpoint": checkpoint,
             "accuracy": f"{statistics.fmean(all_):.2%}",
             "seeds from, to": f"{min(all_):.2%} to {max(all_):.2%}"}
            for (cell, checkpoint), all_ in found.items()]  # fmt: skip


def summarize(folder: Path, results: dict[str, dict], settings: dict) -> None:
    """The sweep's report, table and pictures."""
    first = [*results][1]
    n = results[first]["best"]["report"]
    scope = f'"{first}", same checkpoint; one seed each, so it says nothing about other seeds'
    if len(settings["seeds"] or ()) > 1:
        scope = ("the first cell of the same seed, same checkpoint; how far seeds lie apart, the "
                 "last rows tell")  # fmt: skip
    note = (
        f"Test split, n = {n['n']}; always giving the commonest label scores "
        f"{n['majority_baseline']:.2%}. Accuracy by generation, greedy: anything but a label "
        "counts as wrong. Intervals: Wilson, 95 %. p: McNemar's exact test, same rows, against "
        f"{scope}.\n"
        "best: the checkpoint with the lowest held-out loss; last: the last step's."
    )
    plot_accuracies(results, folder / "accuracy.png")
    curves = {title: read_metrics(folder / f"cell-{i}" / "metrics.jsonl")
              for i, title in enumerate(results) if i}  # fmt: skip
    plot_held_out(curves, folder / "loss.png")
    pictures = ["accuracy.png", "loss.png"]
    print(write_report(folder, "Sweep", note, table(results), settings, pictures))
