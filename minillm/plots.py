"""Every picture the project draws. matplotlib is imported where a picture is drawn."""

import signal
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

from minillm.interrupt import deferred_signals


def _pyplot():
    """matplotlib without a window. A signal waits for the end of the import, whose compiled parts
    end the whole process if they are cut in the middle."""
    with deferred_signals("finishing an import first") as asked:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    if asked.signal is not None:
        signal.raise_signal(asked.signal)
    return pyplot


@contextmanager
def pictures(path: Path, n: int, width: float, height: float, n_rows: int = 1):
    """Yields axes to draw on, n of them side by side in each row, and writes them as one PNG."""
    plt = _pyplot()
    figure, grid = plt.subplots(
        n_rows, n, figsize=(width, height), layout="constrained", squeeze=False
    )
    yield [*grid.flat]
    for axes in grid.flat:
        if not axes.images:
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@contextmanager
def picture(path: Path, width: float = 7, height: float = 4):
    """Yields axes to draw on, and writes them as PNG."""
    with pictures(path, 1, width, height) as (axes,):
        yield axes


def plot_run(
    rows: Sequence[dict], path: Path, floor: float | None = None, before: float | None = None,
    per: str = "supervised token",
) -> None:  # fmt: skip
    """Loss against optimizer steps, training and held-out (from that `before` training on); `floor`
    draws a lower bound, `per` is what a loss is the mean over."""
    with picture(path) as axes:
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=0.8, label="training")
        steps, losses = held_out_losses(rows)
        if before is not None:
            steps, losses = [0, *steps], [before, *losses]
        if steps:
            axes.plot(steps, losses, "o-", ms=3, label="held out")
        if floor is not None:
            axes.axhline(floor, ls="--", lw=0.8, color="grey", label="generator's entropy, at most")
        axes.set(xlabel="optimizer steps", ylabel=f"loss, nats per {per}")
        axes.legend()


def held_out_losses(rows: Sequence[dict]) -> tuple[list, list]:
    """The steps that were evaluated, and their held-out losses."""
    found = [(r["step"], r["held_out_loss"]) for r in rows if "held_out_loss" in r]
    return [step for step, _ in found], [loss for _, loss in found]


def plot_held_out(curves: dict[str, Sequence[dict]], path: Path) -> None:
    """Held-out loss against optimizer steps, a line per run."""
    with picture(path) as axes:
        for title, rows in curves.items():
            axes.plot(*held_out_losses(rows), "o-", ms=3, lw=1, label=title)
        axes.set(xlabel="optimizer steps", yscale="log")
        axes.set_ylabel("held-out loss, nats per supervised token")
        axes.legend(fontsize=8)


def plot_accuracies(results: dict[str, dict], path: Path) -> None:
    """Accuracy with its 95 % interval: a group of bars per cell, one per checkpoint."""
    with picture(path, 8, 0.6 * len(results) + 1.2) as axes:
        for offset, name in ((-0.18, "best"), (0.18, "last")):
            shown = [(i, r[name]["report"]) for i, r in enumerate(results.values()) if name in r]
            middle = [r["accuracy"] for _, r in shown]
            low, high = zip(*(r["interval_95"] for _, r in shown), strict=True)
            errors = [[m - x for m, x in zip(middle, low, strict=True)],
                      [x - m for m, x in zip(middle, high, strict=True)]]  # fmt: skip
            places = [i + offset for i, _ in shown]
            axes.barh(places, middle, 0.34, xerr=errors, label=f"{name} checkpoint")
        axes.set_yticks(range(len(results)), [*results])
        axes.invert_yaxis()
        commonest = next(iter(results.values()))["best"]["report"]["majority_baseline"]
        axes.axvline(commonest, ls="--", lw=0.8, color="grey", label="one label for all")
        axes.set_xlabel("test accuracy by generation, 95 % interval")
        axes.legend(loc="lower left", fontsize=8)


def plot_scores(
    points: dict[str, tuple[int, list[float]]], lines: dict[str, float], path: Path
) -> None:
    """ROUGE-L against trainable parameters: a point per seed of a method, a line per baseline."""
    with picture(path) as axes:
        for title, (count, scores) in points.items():
            axes.plot([count] * len(scores), [100 * s for s in scores], "o", ms=6, label=title)
        for name, score in lines.items():
            axes.axhline(100 * score, ls="--", lw=0.8, color="grey")
            axes.annotate(name, (0.01, 100 * score), xycoords=("axes fraction", "data"), fontsize=8)
        axes.set(xscale="log", xlabel="trainable parameters", ylabel="test ROUGE-L, per seed")
        axes.legend(fontsize=8)


def plot_costs(seconds: dict[str, float], mib: dict[str, float], path: Path) -> None:
    """Training time and peak memory of each method, each as a share of the largest."""
    with picture(path, 8, 0.5 * len(seconds) + 1.2) as axes:
        parts = (("training, s", seconds, -0.18), ("peak memory, MiB", mib, 0.18))
        for name, values, offset in parts:
            largest = max(values.values())
            places = [i + offset for i in range(len(values))]
            bars = axes.barh(places, [v / largest for v in values.values()], 0.34, label=name)
            axes.bar_label(bars, [f"{value:,.0f}" for value in values.values()], fontsize=8)
        axes.set_yticks(range(len(seconds)), [*seconds])
        axes.invert_yaxis()
        axes.set_xlabel("share of the largest")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2, fontsize=8)


def plot_decode(curves: dict[str, dict[int, float]], path: Path) -> None:
    """What one more token costs against the text before it: milliseconds, and tokens per second.
    `curves` are {title: {context length: milliseconds}}."""
    with pictures(path, 2, 11, 4) as (cost, speed):
        for title, points in curves.items():
            cost.plot([*points], [*points.values()], "o-", ms=3, lw=1, label=title)
            speed.plot([*points], [1000 / ms for ms in points.values()], "o-", ms=3, lw=1)
        cost.set_ylabel("milliseconds a token")
        speed.set_ylabel("tokens per second")
        for axes in (cost, speed):
            axes.set(xlabel="tokens before it", yscale="log")
        cost.legend(fontsize=7)


def at_peak(found: dict[str, float]) -> dict[str, float]:
    """Categories that add up to their total: where work is below zero, that much of what forward
    kept was freed before the peak (in full fine-tuning it comes when all gradients are there)."""
    shown = dict(found)
    for name in ("activations", "logits", "16-bit copies of weights"):
        freed = min(shown[name], max(0.0, -shown["work"]))
        shown[name] -= freed
        shown["work"] += freed
    return shown


def plot_memory(
    bars: dict[str, dict[str, float]], seconds: dict[str, float], path: Path
) -> None:
    """Memory by category, stacked, and seconds: a bar per configuration."""
    n, shown = 2 if seconds else 1, [at_peak(found) for found in bars.values()]
    names = [name for name in shown[0] if name != "total"] if shown else []
    with pictures(path, n, 7 * n, 0.32 * len(bars) + 1.6) as row:
        left = [0.0] * len(bars)
        for name in names:
            widths = [found[name] for found in shown]
            row[0].barh(range(len(bars)), widths, left=left, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        row[0].set_xlabel("MiB at the peak (of categories not all there at once, what is)")
        row[0].legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncol=4)
        if seconds:
            row[1].barh(range(len(bars)), [seconds.get(title, 0.0) for title in bars])
            row[1].set_xlabel("seconds")
        for axes in row:
            axes.set_yticks(range(len(bars)), [*bars], fontsize=7)
            axes.invert_yaxis()


def plot_iso_loss(loss: Callable, optimum: Callable, budget: float, path: Path) -> None:
    """Contours of `loss(params, tokens)`, the line of equal compute through `budget`, and the best
    (params, tokens) of every budget."""
    import numpy as np

    best_params, best_tokens = optimum(budget)
    with picture(path) as axes:
        params = best_params * np.logspace(-2, 2, 160)
        tokens = best_tokens * np.logspace(-2, 2, 160)
        losses = loss(params[None], tokens[:, None])  # (tokens, params)
        lines = axes.contour(params, tokens, losses, 18, linewidths=0.8)
        axes.clabel(lines, fontsize=7)
        axes.plot(params, budget / 6 / params, "--", color="grey", label=f"C = {budget:.3g} FLOPs")
        path_of_best = np.array([optimum(budget * 10**x) for x in np.linspace(-4, 4, 60)])
        axes.plot(*path_of_best.T, color="black", lw=1, label="best for its compute")
        axes.plot(best_params, best_tokens, "o", color="black")
        axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="fresh tokens")
        axes.set_title("contours: loss, nats per token", fontsize=9)
        axes.set(xlim=(params[0], params[-1]), ylim=(tokens[0], tokens[-1]))
        axes.legend(fontsize=8)


def plot_spectrum(
    values: dict[str, list], rows: Sequence[dict], before: float, after: float, path: Path
) -> None:
    """What a change of weights is made of: singular values of each layer (a line each, the layers
    of one name in one colour), energy kept against rank, held-out loss against rank."""
    ranks = [row["rank"] for row in rows]
    with pictures(path, 3, 14, 4) as (spectrum, energy, loss):
        kinds = sorted({name.rpartition(".")[2] for name in values})
        for name, parts in values.items():
            kind = name.rpartition(".")[2]
            label = None if kind in spectrum.get_legend_handles_labels()[1] else kind
            for i, s in enumerate(parts):
                spectrum.plot(
                    range(1, len(s) + 1), (s / s[0]).tolist(), lw=0.7, alpha=0.7,
                    color=f"C{kinds.index(kind)}", label=None if i else label,
                )  # fmt: skip
        spectrum.set_ylabel("singular value, as a share of the largest")
        spectrum.set(xlabel="number", xscale="log", yscale="log", ylim=(1e-3, 1.2))
        spectrum.legend(fontsize=7)
        energy.plot(ranks, [row["energy"] for row in rows], "o-", ms=3)
        energy.set(xlabel="rank", xscale="log", ylim=(0, 1.02))
        energy.set_ylabel("share of the squared change that is kept")
        loss.plot(ranks, [row["loss"] for row in rows], "o-", ms=3, label="base + rank r")
        loss.axhline(before, ls="--", lw=0.8, color="grey", label="base")
        loss.axhline(after, lw=0.8, color="black", label="fine-tuned")
        loss.set(xlabel="rank", xscale="log")
        loss.set_ylabel("held-out loss, nats per supervised token")
        loss.legend(fontsize=8)


def plot_attention(
    maps: dict[str, Sequence], heads: Sequence[int], words: Sequence[str], path: Path
) -> None:
    """Attention weights: a row of pictures for each block, one for each head. In a picture, a row
    for each token that looks, a column for each that is seen. `maps` are {block: (H, T, S)}, words
    the S tokens' own (fewer, where a soft prompt or prefix stands before them); of more than 60
    only some are written."""
    n_rows, n_columns = next(iter(maps.values())).shape[1:]
    seen = [*[f"P{i}" for i in range(n_columns - len(words))], *words]
    side = min(max(2.2, 0.16 * n_columns + 1.2), 10)
    height = max(1.2, side * n_rows / n_columns) + 0.4
    shown = range(0, n_columns, -(-n_columns // 60))
    rows, first = [i for i in shown if i >= n_columns - n_rows], n_columns - n_rows
    how = {"fontsize": 6, "parse_math": False}
    with pictures(path, len(heads), side * len(heads), height * len(maps), len(maps)) as grid:
        places = [(name, head) for name in maps for head in heads]
        for axes, (name, head) in zip(grid, places, strict=True):
            axes.imshow(maps[name][head].float().cpu().numpy(), vmin=0, vmax=1, cmap="Blues")
            axes.set_title(f"{name}, head {head}", fontsize=8)
            axes.set_xlabel("token that is seen", fontsize=6)
            axes.set_ylabel("token that looks", fontsize=6)
            axes.set_xticks(shown, [seen[i] for i in shown], rotation=90, **how)
            axes.set_yticks([i - first for i in rows], [seen[i] for i in rows], **how)
