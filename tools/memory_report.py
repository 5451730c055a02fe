"""The report of tools/memory_table.py: the course's two tables, drawn from what was measured (or
predicted), and a sentence for what in them surprises."""

import itertools
import statistics
from pathlib import Path

import torch

from minillm.plots import plot_memory
from minillm.precision import has_native_bf16
from tools.cells import write_report

FEATURES = {"accumulation": "Grad. accumulation", "checkpointing": "Grad. checkpoint",
            "mixed": "Mixed precision", "lora": "LoRA", "stored": "16-bit base (ours)"}  # fmt: skip
QUANTITIES = {
    "parameters": ("frozen weights", "trainable weights", "16-bit copies of weights"),
    "activations": ("activations", "logits"), "gradients": ("gradients",),
    "optimizer state": ("optimizer state",), "peak, tensors": ("total",),
}  # fmt: skip


def by_category(result: dict) -> dict[str, float] | None:
    """MiB as measured; None for a cell that was not."""
    return result["memory"]["measured"] if "memory" in result else None


def summarize(folder: Path, results: dict, settings: dict, device: str) -> None:
    """Writes and prints the report."""
    titles = {cell: title(cell, settings["mixed"], settings["rows"]) for cell in results}
    rows = [line(titles[cell], result) for cell, result in results.items()]
    predict = settings["predict"]
    shown = {cell: r["predicted"] if predict else by_category(r) for cell, r in results.items()}
    bars = {titles[cell]: found for cell, found in shown.items() if found}
    seconds = {titles[cell]: r["seconds"] for cell, r in results.items() if "seconds" in r}
    plot_memory(bars, seconds, folder / "memory.png")
    unit = "allocated on the GPU" if device == "cuda" else (
        "of the process beyond Python and its libraries, as the system counts it")  # fmt: skip
    rounding = "" if predict else rounded(device)
    single = any(cell.single for cell in results)
    sizes = "one sample a step without accumulation" if single else "the same tokens in a step"
    note = (
        f"Every cell saw the same samples in the same order, and {sizes}. Peak: "
        f"{unit}; tensors: what the model's own tensors add up to at their peak, by category, in "
        "MiB, each at its own largest (work: what else the peak holds, below zero where they are "
        f"not all there at once). Time: the training of {settings['trained on']} samples, the "
        "first step counted as the mean of the others, "
        "evaluation left out. LoRA is without dropout, so that its cells' losses compare: with "
        "0.05 A's input is kept once more, and a mask. 1 x 8: one row in a forward, eight forwards "
        f"in a step. x: does not fit; p: predicted, not measured.{rounding}\n\n"
        f"## Table 2\n\n{table_2(results)}\n\n## Table 1\n\n{table_1(results, shown)}\n\n"
        f"{explanations(results, shown)}\n\n## Every cell"
    )
    print(write_report(folder, "Memory and run time", note, rows, settings, ["memory.png"]))


def rounded(device: str) -> str:
    """What to know of mixed precision on a CPU that has no products in 16 bits."""
    if device != "cpu" or has_native_bf16(torch.device(device)):
        return ""
    return (" This CPU has no products in 16 bits: mixed precision is computed in fp32 and rounded "
            "here, so it can save no time.")  # fmt: skip


def title(cell, mixed: str, rows: int) -> str:
    """1 x 8, bf16 over fp32, LoRA, checkpointed."""
    how = f"{mixed}, base in {mixed}" if cell.stored else f"{mixed} over fp32"
    size, steps = cell.step(rows)
    words = [f"{size} x {steps}", how if cell.mixed else "fp32", "LoRA" if cell.lora else "full"]
    return ", ".join([*words, *(["checkpointed"] if cell.checkpointing else [])])


def line(name: str, result: dict) -> dict:
    """A cell's line of the full table."""
    found = {"cell": name, "predicted total": result["predicted"]["total"]}
    if "memory" in result:
        memory = result["memory"]
        found |= {"peak": memory["peak"], **memory["measured"], "seconds": result["seconds"],
                  "last loss": result["losses"][-1]}  # fmt: skip
    else:
        found |= result["predicted"]
        if "failed" in result or not result["fits"]:
            found["seconds"] = f"x (free: {result['free']:,.0f})"
    return found


def table_2(results: dict) -> str:
    """The course's layout, a block of lines for checkpointing off and on, ours below."""
    course = [cell for cell in results if not cell.stored and not cell.checkpointing]
    course.sort(key=lambda c: (c.accumulation, c.mixed, c.lora))
    lines = [
        [name, *("ON" if getattr(cell, word) else "OFF" for cell in course)]
        for name, word in (("GA", "accumulation"), ("MP", "mixed"), ("LoRA", "lora"))
    ]
    lines.insert(1, ["---"] * (len(course) + 1))
    for checkpointing in (False, True):
        cells = [find(results, cell, checkpointing=checkpointing) for cell in course]
        ours = [find(results, cell, checkpointing=checkpointing, stored=True) for cell in course]
        what = "on" if checkpointing else "off"
        lines += [
            [f"Peak, checkpointing {what}", *(peak_text(results.get(c)) for c in cells)],
            [f"Reserved, checkpointing {what}", *(reserved_text(results.get(c)) for c in cells)],
            [f"Tensors, checkpointing {what}", *(total_text(results.get(c)) for c in cells)],
            [f"Run time, s, checkpointing {what}", *(time_text(results.get(c)) for c in cells)],
            [f"Base in 16 bits: tensors, {what}", *(total_text(results.get(c)) for c in ours)],
            [f"Base in 16 bits: run time, {what}", *(time_text(results.get(c)) for c in ours)],
        ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines if any(cells[1:]))


def find(results: dict, like, **changes):
    """The cell that differs from `like` in these, None if there is none."""
    wanted = vars(like) | changes
    return next((cell for cell in results if vars(cell) == wanted), None)


def peak_text(result: dict | None) -> str:
    """The process's peak; x for a cell that does not fit, nothing for one that was not run."""
    return f"{result['memory']['peak']:,.0f}" if result and "memory" in result else misfit(result)


def reserved_text(result: dict | None) -> str:
    """What PyTorch took from a GPU for it, nothing on a CPU."""
    reserved = result["memory"].get("reserved") if result and "memory" in result else None
    return "" if reserved is None else f"{reserved:,.0f}"


def total_text(result: dict | None) -> str:
    """MiB, marked x where it does not fit and p where it is only predicted."""
    if result is None:
        return ""
    if "memory" in result:
        return f"{result['memory']['measured']['total']:,.1f}"
    return f"{misfit(result)} {result['predicted']['total']:,.0f} p".strip()


def time_text(result: dict | None) -> str:
    return f"{result['seconds']:.1f}" if result and "seconds" in result else misfit(result)


def misfit(result: dict | None) -> str:
    """x where there was too little memory, or would be."""
    fits = result is None or (result.get("fits", True) and "failed" not in result)
    return "" if fits else "x"


def pairs(found: dict, feature: str) -> list[tuple]:
    """(off, on) of all cells that differ in one feature alone and have figures; the 16-bit base is
    compared with the same precision over fp32."""
    both = ((find(found, cell, **{feature: False}), cell) for cell in found
            if getattr(cell, feature) and (feature == "stored" or not cell.stored))  # fmt: skip
    return [(off, on) for off, on in both if off and found[off] and found[on]]


def change(before: list[float], after: list[float], least: float) -> str:
    """An arrow and the median of the ratios; no arrow for what is less than `least`."""
    ratios = [b / a for a, b in zip(before, after, strict=True) if a > 0]
    if not ratios:
        return "-"
    by = statistics.median(ratios) - 1
    if abs(by) < least:
        return "-"
    low, high = min(ratios) - 1, max(ratios) - 1
    spread = f" ({low:+.0%} to {high:+.0%})" if low * high < 0 else ""
    return f"{'↑' if by > 0 else '↓'} {abs(by):.1%}{spread}"


def table_1(results: dict, found: dict) -> str:
    """Up, down or unchanged, each feature on against off: the median over all pairs of cells.
    Copies that autocast makes are parameters where they are what the feature is about."""
    single = any(cell.single for cell in results)
    against = "same micro-batch" if single else "against one big batch"
    titles = FEATURES | {"accumulation": f"{FEATURES['accumulation']} ({against})"}
    lines = [["", *titles.values()], ["---"] * (len(titles) + 1)]
    for name, parts in QUANTITIES.items():
        cells = []
        for feature in FEATURES:
            both = pairs(found, feature)
            copies = feature in ("mixed", "stored")
            counted = [part for part in parts if copies or part != "16-bit copies of weights"]
            sums = [[sum(found[c][p] for p in counted) for c in side]
                    for side in zip(*both, strict=True)] or [[], []]  # fmt: skip
            cells.append(change(*sums, 0.0005 if name == "parameters" else 0.005))
        lines.append([name, *cells])
    times = {cell: result.get("seconds") for cell, result in results.items()}
    cells = []
    for feature in FEATURES:
        both = pairs(times, feature)
        sides = [[times[c] for c in side] for side in zip(*both, strict=True)] or [[], []]
        cells.append(change(*sides, 0.05) if sides[0] else "not measured")
    lines.append(["computation (time)", *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def explanations(results: dict, found: dict) -> str:
    """What surprises, with the figures of the cell pair that shows it best."""
    lines = [*mixed_lines(found), *accumulation_lines(found), *lora_lines(found)]
    return "\n".join(f"- {text}" for text in [*lines, *agreement(results)])


def mixed_lines(found: dict) -> list[str]:
    """Autocast over fp32, and what storing the base in 16 bits does about it."""
    shown = [(off, on) for off, on in pairs(found, "mixed") if on.lora and not on.checkpointing]
    if not shown:
        return []
    off, on = shown[-1]
    a, b = found[off], found[on]
    copies, saved = b["16-bit copies of weights"], a["activations"] - b["activations"]
    net = b["total"] - a["total"]
    lines = [
        "Mixed precision over an fp32 base does not shrink the parameters: they stay in fp32, and "
        f"autocast makes a 16-bit copy of every matrix it meets and keeps it for backward, "
        f"{copies:,.1f} MiB with LoRA. Activations shrink by {saved:,.1f} MiB. Together the peak "
        f"{'rises' if net > 0 else 'falls'} by {abs(net):,.1f} MiB here; the larger the model and "
        "the smaller the batch, the more mixed precision costs."
    ]
    checkpointed = find(found, on, checkpointing=True)
    if checkpointed and found[checkpointed]:
        rest = found[checkpointed]["16-bit copies of weights"]
        lines.append(f"With checkpointing those copies come to {rest:,.1f} MiB: a block's are made "
                     "again in backward and dropped with it.")  # fmt: skip
    stored = find(found, on, stored=True)
    if stored and found[stored]:
        c = found[stored]
        lines.append(f"Stored in 16 bits, the base is its own copy: frozen weights "
                     f"{b['frozen weights']:,.1f} to {c['frozen weights']:,.1f} MiB, copies "
                     f"{copies:,.1f} to {c['16-bit copies of weights']:,.1f}, the peak "
                     f"{b['total']:,.1f} to {c['total']:,.1f}.")  # fmt: skip
    return lines


def accumulation_lines(found: dict) -> list[str]:
    """One row at a time against all at once, or against steps of one."""
    shown = [(off, on) for off, on in pairs(found, "accumulation") if not on.checkpointing]
    if not shown:
        return []
    off, on = shown[0]
    a, b = found[off], found[on]
    if off.single:
        return ["Accumulation at the same micro-batch leaves parameters and activations as they "
                f"are ({a['activations']:,.1f} and {b['activations']:,.1f} MiB). Gradients keep "
                "their size, but stay alive from one forward to the next: the peak of tensors "
                f"goes from {a['total']:,.1f} to {b['total']:,.1f} MiB."]  # fmt: skip
    return [f"Accumulation leaves the parameters as they are and divides the activations "
            f"({a['activations']:,.1f} to {b['activations']:,.1f} MiB, at the longest rows). "
            "Gradients keep their size, but stay alive from one forward to the next."]  # fmt: skip


def lora_lines(found: dict) -> list[str]:
    """Where LoRA saves, and where not."""
    shown = [(off, on) for off, on in pairs(found, "lora") if not on.checkpointing]
    if not shown:
        return []
    off, on = shown[0]
    a, b = found[off], found[on]
    before, after = (side["gradients"] + side["optimizer state"] for side in (a, b))
    return [f"LoRA saves gradients and optimizer state, {before:,.1f} to {after:,.1f} MiB. "
            f"Activations go from {a['activations']:,.1f} to {b['activations']:,.1f} MiB: a frozen "
            "layer need not keep its input, but all else down to the first adapted layer is "
            "kept."]  # fmt: skip


def agreement(results: dict) -> list[str]:
    """How far the losses of cells are apart that compute the same thing in another order."""
    groups: dict[tuple, list[list[float]]] = {}
    for cell, result in results.items():
        if "losses" in result:
            # a step of one sample is another than one of eight
            how = "" if not cell.single else "1 x N, " if cell.accumulation else "1 x 1, "
            key = (how, cell.mixed, cell.lora, cell.stored)
            groups.setdefault(key, []).append(result["losses"])
    lines = []
    for (how, mixed, lora, stored), losses in groups.items():
        apart = max((abs(a - b) for one, other in itertools.combinations(losses, 2)
                     for a, b in zip(one, other, strict=True)), default=0.0)  # fmt: skip
        kind = ("16 bits" if mixed else "fp32") + (", base in 16 bits" if stored else "")
        verdict = "they agree" if apart < (0.1 if mixed else 1e-3) else "THEY DO NOT AGREE"
        lines.append(f"Losses of the {len(losses)} cells in {how}{kind}, "
                     f"{'LoRA' if lora else 'full'}: at most {apart:.1e} apart at any "
                     f"step; {verdict}.")  # fmt: skip
    return lines
