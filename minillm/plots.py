"""Every picture the project draws. matplotlib is imported where a picture is drawn."""

from collections.abc import Sequence
from pathlib import Path


def plot_run(rows: Sequence[dict], path: Path, floor: float | None = None) -> None:
    """Loss against optimizer steps, training and held-out, as PNG; `floor` draws a lower bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=0.8, label="training")
    held_out = [(r["step"], r["held_out_loss"]) for r in rows if "held_out_loss" in r]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", ms=3, label="held out")
    if floor is not None:
        axes.axhline(floor, ls="--", lw=0.8, color="grey", label="generator's entropy, at most")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss, nats per supervised token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
