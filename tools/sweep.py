"""The course's tables in one go: LoRA ranks, full fine-tuning, alpha, and prompts, compared.

    python tools/sweep.py --out-dir runs/sweep                          bundled model, on a laptop
    python tools/sweep.py --out-dir runs/medium --init-from gpt2-medium --data rotten_tomatoes/

Every cell is a run of train/finetune_gpt2.py in a process of its own, whose output goes to a .log
beside it, then measured on the test split by generation, with the checkpoint that was best on
validation and with the last one. A cell that is done is not done again: run the same command after
an interruption. Writes report.md, table.csv, accuracy.png and loss.png.

With alpha at four times the rank, an optimizer step moves the weights the further the larger the
rank is, so one learning rate does not suit all: `--lrs` gives each rank its own, `--full-flags`
full fine-tuning. The bundled model comes with both. `--seeds 0,1,2` takes the whole of it once for
each seed, and adds the means: how far one seed's order of the cells can be trusted.
"""

from pathlib import Path

from tqdm import tqdm

import gpt2
from minillm.adapt.methods import MethodOptions
from minillm.cli import Parser, above_zero, amount, positive, seeds, settings_of, several
from minillm.errors import UserError, friendly_errors
from minillm.files import read_json
from minillm.hub import find_checkpoint
from minillm.runs import read_metrics
from tools import evaluate
from tools.cells import (
    check_runs,
    done_once,
    give_back_memory,
    open_experiment,
    parse_training,
    refuse_own,
    run_script,
    split_flags,
)
from tools.models import kept_by
from tools.sweep_report import summarize

SCRIPT = Path(__file__).parent.parent / "train" / "finetune_gpt2.py"
FULL_FLAGS = "--lr 5e-5 --dropout 0.05"
TINY = {"train": ["--config", str(SCRIPT.with_name("tiny_gpt2.json"))],
        "full": "--lr 1e-3 --dropout 0.05", "lrs": [3e-3, 5e-4, 5e-4]}  # fmt: skip
CELLS_OWN = ("rank", "alpha", "template")
TRAINED_AND_MEASURED = ("checkpoint", "init", "layers", "task", "data", "method")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out-dir", required=True, help="folder of the sweep; its cells are folders in it")
    add("--checkpoint", "--init-from", metavar="NAME|PATH", default="tiny-gpt2",
        help="base (default: tiny-gpt2)")  # fmt: skip
    add("--layers", type=positive, help="keep only the first N layers")
    add("--data", help="Rotten Tomatoes' files (default: tinyworld's reviews)")
    add("--ranks", type=several(positive), default=[16, 128, 196], help="LoRA ranks")
    add("--alpha", type=above_zero,
        help="LoRA's alpha, the same for all ranks (default: four times each rank)")  # fmt: skip
    add("--lrs", type=several(amount), help="learning rate of each rank, or one for all")
    add("--templates", default="reviews,reviews-short",
        help="prompts: the first for all cells, the others also at the middle rank")  # fmt: skip
    add("--train-flags", default="", help="flags for every run of finetune_gpt2.py, in quotes")
    add("--full-flags", help=f"flags for full fine-tuning, after those (default: {FULL_FLAGS})")
    add("--seeds", type=seeds, help="all cells once for each (default: one seed, the "
        "training's own)")  # fmt: skip
    add("--test-samples", type=positive, help="measure on the first N of the test split")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


def names(words: list[str]) -> set[str]:
    """The flags among them, spelled with dashes and without values."""
    return {word.partition("=")[0].replace("_", "-") for word in words}


def own_flags(
    checkpoint: str, n_ranks: int, lrs: list[float] | None, train: str, full: str | None
) -> tuple[list[float] | None, list[str], list[str]]:
    """Rates of the ranks, flags of all runs and those of full fine-tuning: as given, or what suits
    the bundled model. Errors: UserError if the rates are not one, or one for each rank."""
    is_tiny = find_checkpoint(checkpoint) == find_checkpoint("tiny-gpt2")
    full = full or (TINY["full"] if is_tiny else FULL_FLAGS)
    given = split_flags(train, "--train-flags")
    flags = [*(TINY["train"] if is_tiny else []), *given]
    has_rate = parse_training(gpt2.FAMILY, given).lr > 0
    if lrs is None and is_tiny and n_ranks == len(TINY["lrs"]) and not has_rate:
        lrs = TINY["lrs"]
    if lrs is not None and len(lrs) not in (1, n_ranks):
        raise UserError(f"--lrs: {len(lrs)} for {n_ranks} ranks; give one for each")
    full_flags = split_flags(full, "--full-flags")
    for words, name in ((given, "--train-flags"), (full_flags, "--full-flags")):
        refuse_own(gpt2.FAMILY, words, TRAINED_AND_MEASURED, name)
    default = parse_training(gpt2.FAMILY, [])
    for words in (given, full_flags):
        parsed, spelled = parse_training(gpt2.FAMILY, words), names(words)
        for name in CELLS_OWN:
            is_word = {f"--{name}", f"--lora-{name}"} & spelled
            if is_word or getattr(parsed, name) != getattr(default, name):
                raise UserError(f"--{name}: every cell has its own; give it as a flag of the sweep")
    return lrs, flags, full_flags


def plan(
    ranks: list[int], lrs: list[float] | None, templates: list[str], full_flags: list[str],
    alpha: float | None = None,
) -> dict[str, list[str]]:  # fmt: skip
    """The flags of each cell, by its title: the rows of the course's three tables. `alpha` is that
    of all ranks, four times each rank's if None."""
    lrs = lrs * len(ranks) if lrs and len(lrs) == 1 else lrs
    lr_of = dict(zip(ranks, lrs, strict=True)) if lrs else {}
    alphas = {rank: alpha or 4 * rank for rank in ranks}

    def lora(rank: int, alpha: float, template: str = templates[0]) -> list[str]:
        flags = ["--rank", str(rank), "--alpha", f"{alpha:g}", "--template", template]
        return [*flags, "--lr", str(lr_of[rank])] if lrs else flags

    first, middle = ranks[0], ranks[len(ranks) // 2]
    cells = {f"LoRA r {rank}, alpha {alphas[rank]:g}": lora(rank, alphas[rank]) for rank in ranks}
    cells["full fine-tuning"] = ["--rank", "0", "--template", templates[0], *full_flags]
    cells[f"LoRA r {first}, alpha {4 * alphas[first]:g}"] = lora(first, 4 * alphas[first])
    for template in templates[1:]:
        cells[f"LoRA r {middle}, prompt {template}"] = lora(middle, alphas[middle], template)
    return cells


def over_seeds(cells: dict[str, list[str]], seeds: list[int] | None) -> dict[str, list[str]]:
    """All cells with the first seed, then all with the next; as they are without seeds."""
    if not seeds:
        return cells
    return {f"{title}, seed {seed}": [*flags, "--seed", str(seed)]
            for seed in seeds for title, flags in cells.items()}  # fmt: skip


def measure(flags: list[str], folder: Path) -> dict:
    """Test accuracy by generation, and which rows were right. Errors: UserError."""
    report = evaluate.main([*flags, "--by", "generation", "--out-dir", str(folder)])
    give_back_memory()
    rows = read_json(folder / "evaluation-test" / "generation" / "predictions.json")
    right = [row["true label"] == row["predicted label"] for row in rows]
    return {"report": report["generation"], "right": right}


def scale_of(settings: dict) -> float | None:
    """How much LoRA's update counts in a run, None without LoRA."""
    rank = settings["rank"]
    options = MethodOptions(
        rank=rank, alpha=settings["alpha"], rslora=settings.get("rslora", False)
    )
    return options.effective_alpha / rank if rank else None


def train_and_measure(folder: Path, flags: list[str], measured: list[str]) -> dict:
    """Trains one cell and measures what it kept: its best checkpoint, and its last."""
    run_script(SCRIPT, folder, ["--keep-last", *flags])
    flag, best = kept_by(folder)
    rows = read_metrics(folder / "metrics.jsonl")
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    results = {"best": measure([flag, str(best), *measured], best)}
    results["last"] = results["best"]  # the same weights, if the last evaluation was the best
    if min(held_out) != rows[-1]["held_out_loss"]:
        _, last = kept_by(folder, "_last")
        results["last"] = measure([flag, str(last), *measured], last)
    began, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    return results | {
        "lr": began["lr"], "scale": scale_of(began),
        "trainable": f"{summary['trainable']:,}, "
                     f"{summary['trainable'] / summary['parameters']:.2%} of all",
        "steps": len(rows), "best held-out loss": min(held_out),
    }  # fmt: skip


def main(argv=None) -> dict[str, dict]:
    args = parse_args(argv)
    lrs, train_flags, full_flags = own_flags(
        args.checkpoint, len(args.ranks), args.lrs, args.train_flags, args.full_flags
    )
    templates = args.templates.split(",")
    given = parse_training(gpt2.FAMILY, [*train_flags, *full_flags])
    if args.seeds and given.seed:
        raise UserError("--seed: every run has one of --seeds; leave it out")
    cells = over_seeds(plan(args.ranks, lrs, templates, full_flags, args.alpha), args.seeds)
    common = ["--task", "rotten_tomatoes", "--device", args.device,
              *(["--data", args.data] if args.data else [])]  # fmt: skip
    layers = ["--layers", str(args.layers)] if args.layers else []
    base = ["--checkpoint", args.checkpoint, *layers]
    check_runs(gpt2.FAMILY, ([*base, *train_flags, *common, *own] for own in cells.values()))
    settings = settings_of(args) | {"cells": cells, "train-flags": train_flags}
    folder = open_experiment(args.out_dir, settings)
    measured = [*common, *(["--samples", str(args.test_samples)] if args.test_samples else []),
                *(["--skip-bad"] if given.skip_bad else [])]  # fmt: skip

    def untuned() -> dict:
        flags = [*base, "--template", templates[0], *measured]
        return {"best": measure(flags, folder / "cell-0")}

    def trained(number: int, title: str) -> dict:
        flags = [*base, *train_flags, *common, *cells[title]]
        return train_and_measure(folder / f"cell-{number}", flags, measured)

    results = {"no tuning": done_once(folder / "cell-0.json", untuned)}
    for number, title in enumerate(tqdm(cells, desc="cells", unit="cell"), 1):
        kept = folder / f"cell-{number}.json"
        results[title] = done_once(kept, lambda n=number, t=title: trained(n, t))
    summarize(folder, results, settings)
    return results


if __name__ == "__main__":
    with friendly_errors():
        main()
