"""Fine-tuning methods compared on one task: equal data and steps, each at its own learning rate.

    python tools/compare_methods.py --out-dir runs/methods                  on a laptop
    python tools/compare_methods.py --out-dir runs/tale --checkpoint tiny-llama --task shakespeare
    python tools/compare_methods.py --out-dir runs/cnn --checkpoint gpt2 --data cnn_dailymail/ \\
        --train-flags "--samples 21000 --held-out 6000 --epochs 10 --eval-every 160 --patience 2 \\
        --max-length 1024" --search-steps 160 --test-samples 3000

For each method the rate is searched first: a short run with each rate of a grid (--grid), the one
with the lowest held-out loss is taken; or it is given (--lrs lora=3e-3,full=1e-4). Then a run per
seed, whose best checkpoint writes freely for the test split. Every run is a process of its own,
its output goes to a .log beside its folder; a cell that is done is not done again. Writes
report.md, table.csv, loss.png, rouge.png and cost.png.
"""

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

from minillm.adapt.methods import METHODS
from minillm.cli import Parser, amount, check_known, positive, seeds, settings_of
from minillm.data.tasks import TASKS
from minillm.errors import NumericError, UserError, friendly_errors
from minillm.family import Family
from minillm.files import read_json
from minillm.hub import find_checkpoint
from minillm.text_metrics import rouge
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
from tools.methods_report import summarize
from tools.models import family_of, kept_by

SCRIPTS = Path(__file__).parent.parent / "train"
GRID = {  # learning rates tried with a model of GPT-2's size and up
    "full": (2e-5, 1e-4, 5e-4), "last_layer": (1e-4, 5e-4, 2e-3), "last_block": (1e-4, 5e-4, 2e-3),
    "bitfit": (5e-4, 2e-3, 1e-2), "lora": (2e-4, 1e-3, 4e-3), "adapters": (2e-4, 1e-3, 4e-3),
    "prompt_tuning": (1e-2, 5e-2, 2e-1), "prefix_tuning": (3e-3, 1e-2, 5e-2),
}  # fmt: skip
TINY_GRID = {  # with a bundled one: small models want large steps
    "full": (5e-4, 2e-3, 5e-3), "last_layer": (2e-3, 1e-2, 3e-2), "last_block": (2e-3, 1e-2, 3e-2),
    "bitfit": (2e-2, 1e-1, 3e-1), "lora": (5e-3, 1e-2, 3e-2), "adapters": (5e-3, 2e-2, 5e-2),
    "prompt_tuning": (5e-2, 2e-1, 5e-1), "prefix_tuning": (2e-1, 5e-1, 1.5),
}  # fmt: skip
TEXT_TASKS = [name for name, task in TASKS.items() if task.has_test and not task.labels]
TINY_FLAGS = (
    "--samples 1200 --held-out 100 --epochs 1 --batch-size 8 --accumulation-steps 1 "
    "--eval-every 50 --schedule cosine --warmup 10 --attention explicit"
)
OF_TOOL = ("checkpoint", "init", "task", "data", "method", "lr", "seed")
COMMON_FLAGS = "--schedule cosine --warmup 50 --eval-every 200"


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out-dir", required=True, help="folder of the comparison; its cells are folders in it")
    add("--checkpoint", "--init-from", metavar="NAME|PATH", default="tiny-gpt2",
        help="base (default: tiny-gpt2)")  # fmt: skip
    add("--task", choices=TEXT_TASKS, default="cnn_dailymail", help="what the data is")
    add("--data", help="the task's official file or folder (default: tinyworld's stand-in)")
    add("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    add("--lrs", default="", help="rates that need no search: lora=3e-3,full=1e-4")
    add("--grid", default="", help="rates to search, as lora=1e-3:3e-3,full=1e-4:3e-4 (each method "
        "has three by default)")  # fmt: skip
    add("--search-steps", type=positive, default=50, help="optimizer steps of a run of the search")
    add("--seeds", type=seeds, default=[0, 1], help="a run each (default: 0,1)")
    add("--train-flags", default="", help="flags of every run of the script, in quotes, "
        f"put after {TINY_FLAGS} for a bundled model, else after {COMMON_FLAGS}")  # fmt: skip
    add("--test-samples", type=positive, default=100, help="of the test split (default: 100)")
    add("--max-new-tokens", type=positive, help="tokens written (default: the task's own)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


def rates(text: str, methods: list[str]) -> dict[str, list[float]]:
    """{method: its rates} of "lora=1e-3:3e-3,full=1e-4". Errors: UserError."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, values = part.partition("=")
        if name.strip() not in methods:
            raise UserError(f"learning rate of {name!r}: not among --methods {','.join(methods)}")
        try:
            found[name.strip()] = [amount(value) for value in values.split(":")]
        except (ValueError, argparse.ArgumentTypeError):
            raise UserError(f"learning rates {part!r}: write METHOD=RATE or RATE:RATE") from None
    return found


def context_of(family: Family, base: Path) -> int:
    """Tokens that a checkpoint's model can see. No weight is read."""
    model, _ = family.load(base, None, torch.float32, torch.device("meta"), None)
    return model.config.max_seq_len


def longest_sample(max_length: int, n_virtual: int, methods: list[str], context: int) -> int:
    """Tokens of a sample: --max-length, or what virtual tokens leave of the context, for all
    methods where one of them has any, so that all see the same."""
    given = min(max_length, context)
    has_virtual = {"prompt_tuning", "prefix_tuning"} & {*methods}
    length = min(given, context - n_virtual) if has_virtual else given
    if length < given:
        print(f"samples of up to {length} tokens for all methods: {n_virtual} of the context of "
              f"{context} are virtual in {' and '.join(sorted(has_virtual))}")  # fmt: skip
    return length


def of_model(layers: int | None, template: str | None) -> list[str]:
    """What evaluate takes too: a run's own folder tells it, an untuned model's does not."""
    found = {"--layers": layers, "--template": template}
    return [word for name, value in found.items() if value for word in (name, str(value))]


def search(folder: Path, script: Path, method: str, grid: list[float], flags: list[str]) -> dict:
    """Held-out loss of a short run with each rate (None where it diverged), and the best rate.

    Errors: UserError if all diverged.
    """
    losses = {}
    for lr in grid:
        cell = folder / f"search-{method}-{lr}"
        try:
            run_script(script, cell, [*flags, "--method", method, "--lr", str(lr)])
            losses[str(lr)] = read_json(cell / "summary.json")["held_out_best"]
        except NumericError:
            losses[str(lr)] = None
    found = {lr: loss for lr, loss in losses.items() if loss is not None}
    if not found:
        raise UserError(f"{method}: no rate of {', '.join(losses)} trains; give others by --grid")
    return {"losses": losses, "lr": float(min(found, key=found.get))}


def measure(flags: list[str], folder: Path) -> dict:
    """What evaluate says of the test split, ROUGE row by row, and how long that took."""
    began = time.perf_counter()
    report = evaluate.main([*flags, "--out-dir", str(folder)])["text"]
    seconds = time.perf_counter() - began
    give_back_memory()
    rows = read_json(folder / "evaluation-test" / "text" / "predictions.json")
    answers, references = zip(*((row["response"], row["reference"]) for row in rows), strict=True)
    scores = rouge(answers, references) if "rouge" in report else {}
    return {"report": report, "rouge": scores, "eval_seconds": seconds}


def train_and_measure(script: Path, folder: Path, flags: list[str], measured: list[str]) -> dict:
    """One run and its numbers: those of the run itself, of what it saved, of the test split."""
    run_script(script, folder, flags)
    flag, kept = kept_by(folder)
    files = [*kept.glob("*model.safetensors")]
    found = measure([flag, str(kept), *measured], kept)
    saved = {"saved_bytes": sum(file.stat().st_size for file in files)}
    return found | saved | {"summary": read_json(folder / "summary.json")}


def main(argv=None) -> dict:
    args = parse_args(argv)
    methods = [name.strip() for name in args.methods.split(",")]
    check_known("method", methods, METHODS)
    base = find_checkpoint(args.checkpoint)
    is_tiny = base.name.startswith("tiny-")
    given = rates(args.lrs, methods)
    if any(len(found) > 1 for found in given.values()):
        raise UserError("--lrs: one rate for a method; several to choose from go to --grid")
    grid = (TINY_GRID if is_tiny else GRID) | rates(args.grid, methods)
    own = f"{TINY_FLAGS if is_tiny else COMMON_FLAGS} {args.train_flags}"
    train_flags = split_flags(own, "--train-flags")
    family = family_of(base)
    refuse_own(family, split_flags(args.train_flags, "--train-flags"), OF_TOOL, "--train-flags")
    script = SCRIPTS / f"finetune_{family.name}.py"
    searched = {method: list(grid[method]) for method in methods if method not in given}
    data = ["--task", args.task, "--device", args.device,
            *(["--data", args.data] if args.data else [])]  # fmt: skip
    flags = ["--checkpoint", str(base), *data, "--add-biases", *train_flags]
    check_runs(family, ([*flags, "--method", method] for method in methods))
    shared = parse_training(family, train_flags)
    length = longest_sample(
        shared.max_length, shared.virtual_tokens, methods, context_of(family, base)
    )
    flags += ["--max-length", str(length)]
    settings = settings_of(args) | {"train-flags": train_flags, "grid": searched}
    folder = open_experiment(args.out_dir, settings)
    measured = [*data, "--samples", str(args.test_samples), "--max-length", str(length)]
    measured += ["--max-new-tokens", str(args.max_new_tokens)] if args.max_new_tokens else []
    measured += ["--skip-bad"] if shared.skip_bad else []
    of_base = of_model(shared.layers, shared.template)
    untuned = done_once(folder / "untuned.json", lambda: measure(
        ["--checkpoint", str(base), *of_base, *measured], folder / "untuned"
    ))  # fmt: skip
    # a tenth of a short run warms up: with the long run's warm-up it might do nothing else
    short = [*flags, "--max-iters", str(args.search_steps), "--seed", str(args.seeds[0]),
             "--warmup", str(args.search_steps // 10)]  # fmt: skip
    chosen, runs = {}, {}
    for method in tqdm(methods, desc="methods", unit="method"):
        if method in given:
            chosen[method] = {"lr": given[method][0], "losses": {}}
        else:
            chosen[method] = done_once(
                folder / f"search-{method}.json",
                lambda m=method: search(folder, script, m, list(grid[m]), short),
            )
        lr = ["--method", method, "--lr", str(chosen[method]["lr"])]
        runs[method] = [
            done_once(
                folder / f"{method}-seed{seed}.json",
                lambda cell=folder / f"{method}-seed{seed}", own=(*lr, "--seed", str(seed)):
                train_and_measure(script, cell, [*flags, *own], measured),
            ) for seed in args.seeds
        ]  # fmt: skip
    summarize(folder, untuned, chosen, runs, settings, args.seeds[0])
    return runs


if __name__ == "__main__":
    with friendly_errors():
        main()
