"""The report of tools/compare_methods.py: a line per method, the baselines' lines, the pictures."""

import statistics
from pathlib import Path

from minillm.plots import plot_costs, plot_held_out, plot_scores
from minillm.runs import read_metrics
from minillm.text_metrics import CONVENTION, ROUGE, mean_with_interval
from tools.cells import write_report


def method_row(method: str, lr: float, runs: list[dict]) -> dict:
    """A line of the table: means over seeds, ROUGE's interval over test rows of the seeds' mean."""
    reports, summaries = [run["report"] for run in runs], [run["summary"] for run in runs]

    def mean(values) -> float:
        return statistics.fmean(values)

    losses = [report["loss"] for report in reports]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    first = summaries[0]
    return {
        "method": method, "lr": lr, "test loss": f"{mean(losses):.3f}{spread}",
        "perplexity": f"{mean(report['perplexity'] for report in reports):.2f}",
        **rouge_columns(runs), "stopped": f"{mean(r['stopped_share'] for r in reports):.0%}",
        "tokens": f"{mean(r['mean_tokens'] for r in reports):.1f}",
        **shared_column(reports), "trainable": f"{first['trainable']:,}",
        "% of all": f"{100 * first['trainable'] / first['parameters']:.3f}",
        "added": f"{first['added']:,}" if "added" in first else None,
        "saved, kB": f"{runs[0]['saved_bytes'] / 1000:,.1f}",
        "epochs": mean(s["epochs"] for s in summaries) if "epochs" in first else None,
        "steps": f"{mean(s['steps'] for s in summaries):.0f}",
        "tokens seen": f"{mean(s['tokens'] for s in summaries):,.0f}",
        "train s": f"{mean(s['seconds'] for s in summaries):.1f}",
        "test s": f"{mean(run['eval_seconds'] for run in runs):.1f}",
        "peak MiB": f"{mean(s['memory_mib']['peak'] for s in summaries):,.0f}",
        "TFLOP": f"{mean(s['flops'] for s in summaries) / 1e12:.2f}",
    }  # fmt: skip


def rouge_columns(runs: list[dict]) -> dict:
    """Mean and interval of each kind, over rows, of the runs' mean; none where not measured."""
    kinds = ROUGE if runs[0]["rouge"] else ()
    return {kind: interval_text(mean_with_interval(by_row(runs, kind))) for kind in kinds}


def by_row(runs: list[dict], kind: str) -> list[float]:
    """A kind of ROUGE of each test row, the mean of the runs."""
    rows = zip(*(run["rouge"][kind] for run in runs), strict=True)
    return [statistics.fmean(scores) for scores in rows]


def behind_the_best(runs: dict[str, list[dict]]) -> dict[str, str]:
    """How much ROUGE-L a method has less than the best one, row by row, and the interval of that:
    rows that are hard for one are hard for all, which two intervals apart do not see."""
    scores = {method: by_row(found, "rougeL") for method, found in runs.items()}
    best = max(scores, key=lambda method: statistics.fmean(scores[method]))
    return {
        method: interval_text(mean_with_interval(
            [score - top for score, top in zip(own, scores[best], strict=True)]
        )) if method != best else "the best"
        for method, own in scores.items()
    }  # fmt: skip


def interval_text(found: dict) -> str:
    """29.2 (27.9 to 30.4)."""
    low, high = found["interval_95"]
    return f"{100 * found['mean']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def shared_column(reports: list[dict]) -> dict:
    """The longest copy from the training text, where that was looked for."""
    if "longest_shared" not in reports[0]:
        return {}
    return {"longest copy, characters": max(len(report["longest_shared"]) for report in reports)}


def at_the_edge(found: dict) -> str:
    """A remark where the best rate is the smallest or largest one tried."""
    tried = [float(lr) for lr in found["losses"]]
    edge = len(tried) > 1 and found["lr"] in (min(tried), max(tried))
    return " (the best is at the grid's edge: a wider one may find better)" if edge else ""


def other_rows(untuned: dict) -> list[dict]:
    """The task's baselines and the model as it was."""
    report = untuned["report"]
    rows = [
        {"method": name, **{kind: interval_text(scores[kind]) for kind in ROUGE}}
        for name, scores in report.get("baselines", {}).items()
    ]
    return [*rows, {
        "method": "no tuning", "test loss": f"{report['loss']:.3f}",
        "perplexity": f"{report['perplexity']:.2f}", **rouge_columns([untuned]),
        "stopped": f"{report['stopped_share']:.0%}", "tokens": f"{report['mean_tokens']:.1f}",
        **shared_column([report]), "test s": f"{untuned['eval_seconds']:.1f}",
    }]  # fmt: skip


def summarize(
    folder: Path, untuned: dict, chosen: dict[str, dict], runs: dict[str, list[dict]],
    settings: dict, seed: int,
) -> None:  # fmt: skip
    """The comparison's report, table and pictures."""
    rows = [method_row(method, chosen[method]["lr"], found) for method, found in runs.items()]
    tried = "\n".join(
        f"- {method}: " + ", ".join(f"{lr} " + ("diverged" if loss is None else f"{loss:.3f}")
                                   for lr, loss in found["losses"].items()) + at_the_edge(found)
        for method, found in chosen.items() if found["losses"]
    )  # fmt: skip
    of_runs = [found[0]["summary"] for found in runs.values()]
    data = [f"{side}: {told}" for side, told in of_runs[0].get("data", {}).items()]
    trained = "\n".join(f"- {line}" for line in [*data, *(s["method"] for s in of_runs)])
    n = untuned["report"]["n"]
    n_loss = untuned["report"].get("loss_n", n)
    fits = "" if n_loss == n else f", of the {n_loss} samples that have room in --max-length"
    note = (
        f"Test split, n = {n}, greedy; {len(next(iter(runs.values())))} seeds each. Test loss: "
        "nats per token of the reference, end of text included (mean ± standard deviation over "
        f"seeds){fits}. "
        f"ROUGE: {CONVENTION}. Train s: evaluation left out; test s: loading, writing, scoring. "
        "TFLOP are counted from the model, not measured. Peak MiB: growth of the process from "
        "before it loaded the model, over training and its held-out evaluations. Methods that "
        "train the base's own tensors keep it in fp32, the others in the precision they compute "
        "in. The test split is measured as tools/evaluate.py does by default, in fp32 on a CPU. "
        "tokens: of an answer, on average.\n\n"
        f"{trained}\n\nLowest held-out loss of the search's steps, by learning rate:\n\n"
        f"{tried or '(none searched)'}"
    )
    pictures = ["loss.png", "cost.png"]
    curves = {m: read_metrics(folder / f"{m}-seed{seed}" / "metrics.jsonl") for m in runs}
    plot_held_out(curves, folder / "loss.png")
    summaries = {method: found[0]["summary"] for method, found in runs.items()}
    plot_costs(
        {m: s["seconds"] for m, s in summaries.items()},
        {m: s["memory_mib"]["peak"] for m, s in summaries.items()}, folder / "cost.png",
    )  # fmt: skip
    if untuned["rouge"]:
        for row, behind in zip(rows, behind_the_best(runs).values(), strict=True):
            row["rougeL - best's"] = behind
        points = {}
        for method, found in runs.items():
            scores = [statistics.fmean(r["rouge"]["rougeL"]) for r in found]
            points[method] = (summaries[method]["trainable"], scores)
        lines = {name: s["rougeL"]["mean"] for name, s in untuned["report"]["baselines"].items()}
        plot_scores(points, lines, folder / "rouge.png")
        pictures.append("rouge.png")
    title = "Fine-tuning methods compared"
    print(write_report(folder, title, note, [*other_rows(untuned), *rows], settings, pictures))
