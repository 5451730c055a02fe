"""The course's tables of memory and time: accumulation, mixed precision, LoRA, checkpointing.

    python tools/memory_table.py --out-dir runs/memory               bundled model, minutes
    python tools/memory_table.py --out-dir runs/7b --checkpoint llama-2-7b --data alpaca_data.json
    python tools/memory_table.py --out-dir runs/paper --init llama-2-7b --predict --memory 40536 \\
        --data alpaca_data.json --tokenizer tokenizer.model

Every cell is a fine-tuning in a process of its own, over the same samples in the same order, with
the same tokens in every optimizer step: 1 x 8 with accumulation, 8 x 1 without (with --batch-one
1 x 1, as in the course's own tables: fewer tokens a step). Its memory is predicted first; a cell
that would not fit is not run but marked x, with what it would need (with --predict, one that would
not fit --memory). On a GPU it fits with a tenth and 1,024 MiB to spare, for the CUDA context and
what the allocator leaves over. To the course's axes comes ours: frozen weights stored in 16 bits
(--frozen-dtype), beside autocast over an fp32 base. The first step is timed as the mean of the
others. A cell that is done is not done again; what it prints goes to a .log beside its folder.
Writes report.md (both tables, with what surprises in them explained), table.csv and memory.png.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

from minillm import finetune
from minillm.adapt.methods import MethodOptions, adapt
from minillm.cli import Parser, amount, positive, settings_of
from minillm.data.batches import Batches, Row
from minillm.data.tasks import TASKS
from minillm.errors import UserError, friendly_errors
from minillm.family import Family
from minillm.files import read_json
from minillm.footprint import predict_footprint
from minillm.hub import find_checkpoint
from minillm.job import DataOptions
from minillm.memory import MIB, free_mib
from minillm.precision import Precision, choose_device, choose_precision
from minillm.runs import read_metrics
from tools.cells import OutOfMemory, done_once, open_experiment, run_script
from tools.limits import describe_machine
from tools.memory_report import summarize
from tools.models import family_of, family_of_preset

SCRIPTS = Path(__file__).parent.parent / "train"
# what a process needs beyond its tensors: (a share of them, MiB; of a GPU, the CUDA context)
SPARE = {"cuda": (1.1, 1024), "cpu": (1.9, 512)}


@dataclass(frozen=True)
class Cell:
    """One configuration; `stored`: the frozen weights are kept in the 16 bits that are computed
    in, not in fp32; `single`, of all cells or none: without accumulation a step is one sample."""

    accumulation: bool
    mixed: bool
    lora: bool
    checkpointing: bool
    stored: bool = False
    single: bool = False

    @property
    def name(self) -> str:
        """Its folder."""
        axes = {word: on for word, on in vars(self).items() if word != "single"}
        return "-".join(f"{word}{int(on)}" for word, on in axes.items())

    def step(self, rows: int) -> tuple[int, int]:
        """Samples in a forward and forwards in an optimizer step, of `rows` samples by default."""
        if self.accumulation:
            return 1, rows
        return 1 if self.single else rows, 1

    def flags(self, rows: int, mixed: str) -> list[str]:
        """What makes a fine-tuning this cell, for `rows` samples in an optimizer step."""
        size, steps = self.step(rows)
        frozen = mixed if self.stored else "fp32"
        return [
            "--batch-size", str(size), "--accumulation-steps", str(steps),
            "--precision", mixed if self.mixed else "fp32",
            *(["--method", "lora", "--frozen-dtype", frozen] if self.lora else
              ["--method", "full"]),
            *(["--gradient-checkpointing"] if self.checkpointing else []),
        ]  # fmt: skip


OFF_ON = (False, True)


def all_cells(single: bool = False) -> list[Cell]:
    """The course's sixteen, and our four with a base stored in 16 bits."""
    course = [Cell(ga, mp, lora, gc) for gc, ga, mp, lora in itertools.product(OFF_ON, repeat=4)]
    ours = [Cell(ga, True, True, gc, True) for gc, ga in itertools.product(OFF_ON, OFF_ON)]
    return [replace(cell, single=single) for cell in course + ours]


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out-dir", required=True, help="folder of the experiment; its cells are folders in it")
    add("--checkpoint", "--init-from", metavar="NAME|PATH",
        help="base (default: tiny-llama)")  # fmt: skip
    add("--init", metavar="PRESET", help="random weights of a published size instead")
    add("--layers", type=positive, help="keep only the first N layers")
    add("--tokenizer", help="tokenizer file, where the checkpoint has none")
    add("--task", choices=[*TASKS], default="alpaca", help="what the data is")
    add("--data", help="the task's official file or folder (default: tinyworld's stand-in)")
    add("--samples", type=positive, default=200, help="train on the first N samples")
    add("--max-length", type=positive, default=512, help="tokens of a sample, EOS included")
    add("--rows", type=positive, default=8, help="samples in an optimizer step")
    add("--batch-one", action="store_true",
        help="without accumulation a step is one sample, as in the course's tables")  # fmt: skip
    add("--lr", type=amount, default=1e-5, help="of every cell (default: the course's)")
    add("--predict", action="store_true", help="predict every cell, run none")
    add("--memory", type=positive, metavar="MIB",
        help="with --predict: of your GPU, to mark what does not fit it")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Base:
    """What all cells start from: where the weights are, and the data."""

    family: Family
    checkpoint: str | None
    preset: str | None
    layers: int | None
    tokenizer: str | None
    task: str
    data: str | None
    samples: int
    max_length: int
    device: torch.device

    def flags(self) -> list[str]:
        """The same, for the script."""
        named = {
            "--checkpoint": self.checkpoint, "--init": self.preset, "--layers": self.layers,
            "--tokenizer": self.tokenizer, "--task": self.task, "--data": self.data,
            "--samples": self.samples, "--max-length": self.max_length, "--device": self.device,
        }  # fmt: skip
        given = [[flag, str(value)] for flag, value in named.items() if value is not None]
        return list(itertools.chain.from_iterable(given))

    def load(self, dtype: torch.dtype):
        """The model on no device, and the tokenizer."""
        where = (self.family, self.checkpoint, self.preset, self.layers, self.tokenizer)
        return finetune.load_base(*where, dtype, torch.device("meta"))[:2]

    @cached_property
    def rows(self) -> list[Row]:
        """The training rows, encoded."""
        model, tokenizer = self.load(torch.float32)
        options = DataOptions(
            self.task, self.data, samples=self.samples, held_out=1, max_length=self.max_length
        )
        return finetune.prepare_data(options, tokenizer, model.config.max_seq_len).train.rows

    def predict(self, cell: Cell, rows: int, mixed: str) -> dict[str, float]:
        """MiB by category, without a weight read or a number computed."""
        precision = Precision(mixed if cell.mixed else "fp32", self.device)
        model, tokenizer = self.load(precision.dtype if cell.stored else torch.float32)
        options = MethodOptions(targets=self.family.targets, lora_dropout=0.0)
        model, _ = adapt(model, tokenizer, "lora" if cell.lora else "full", options)
        model.gradient_checkpointing = cell.checkpointing
        size, steps = cell.step(rows)
        batches = Batches(self.rows, size, tokenizer.pad_id, 0, model.config.max_seq_len)
        found = predict_footprint(model, batches.largest(), precision, steps)
        return {name: n / MIB for name, n in found.rows().items()}


@contextmanager
def _plain_products() -> Iterator[None]:
    """Without the copies that products take on this CPU: what is predicted is of a GPU. (PyTorch's
    own mkldnn.flags does the same, with a warning about TF32.)"""
    was, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = was


def forecast(base: Base, cell: Cell, rows: int, mixed: str, memory: int | None) -> dict:
    """What a cell would need, what is free here or, given `memory`, on a GPU of so many MiB (0: not
    known), and whether it fits."""
    with nullcontext() if memory is None else _plain_products():
        predicted = base.predict(cell, rows, mixed)
    free = free_mib(base.device) if memory is None else memory
    factor, more = SPARE["cpu" if memory is None and base.device.type == "cpu" else "cuda"]
    fits = not free or factor * predicted["total"] + more < free
    return {"predicted": predicted, "free": free, "fits": fits}


def script_flags(base: Base, cell: Cell, rows: int, mixed: str, lr: float) -> list[str]:
    """What the fine-tuning of a cell is called with."""
    same = ["--lr", str(lr), "--held-out", "8", "--epochs", "1", "--lora-dropout", "0",
            "--attention", "sdpa", "--no-save"]  # fmt: skip
    return [*base.flags(), *cell.flags(rows, mixed), *same]


def training_seconds(steps: list[dict]) -> float:
    """Of all steps (lines of metrics.jsonl), the first, which warms up, as the others' mean."""
    seconds = [row["tokens"] / row["tokens_per_s"] for row in steps]
    timed = seconds[1:] or seconds
    return sum(timed) / len(timed) * len(seconds)


def measure(base: Base, cell: Cell, rows: int, mixed: str, lr: float, folder: Path) -> dict:
    """Runs a cell: its memory, seconds for the samples, and losses. `failed` says why where it ran
    out of memory all the same."""
    script = SCRIPTS / f"finetune_{base.family.name}.py"
    try:
        run_script(script, folder, script_flags(base, cell, rows, mixed, lr))
    except OutOfMemory as error:
        return {"failed": str(error)}
    steps = read_metrics(folder / "metrics.jsonl")
    return {
        "memory": read_json(folder / "summary.json")["memory_mib"],
        "seconds": training_seconds(steps),
        "tokens": sum(row["tokens"] for row in steps), "losses": [row["loss"] for row in steps],
    }  # fmt: skip


def main(argv=None) -> dict[Cell, dict]:
    args = parse_args(argv)
    if args.memory and not args.predict:
        raise UserError("--memory: is of another machine; add --predict, or leave it out")
    device = choose_device(args.device)
    if args.init:
        family = family_of_preset(args.init)
    else:
        family = family_of(find_checkpoint(args.checkpoint or "tiny-llama"))
    mixed = choose_precision("auto", device).name
    mixed = "bf16" if mixed == "fp32" else mixed  # a CPU without it computes in fp32 and rounds
    base = Base(family, args.checkpoint, args.init, args.layers, args.tokenizer, args.task,
                args.data, args.samples, args.max_length, device)  # fmt: skip
    folder = open_experiment(args.out_dir, settings_of(args))
    results = {}
    for cell in tqdm(all_cells(args.batch_one), desc="cells", unit="cell"):
        kept = folder / f"{cell.name}.json"
        found = read_json(kept) if kept.exists() else forecast(
            base, cell, args.rows, mixed, (args.memory or 0) if args.predict else None
        )
        if found["fits"] and not args.predict:  # a refusal is not kept: another day has more room

            def work(cell=cell, found=found) -> dict:
                where = folder / cell.name
                return found | measure(base, cell, args.rows, mixed, args.lr, where)

            found = done_once(kept, work)
        results[cell] = found
    settings = settings_of(args) | {"mixed": mixed, "trained on": len(base.rows),
                                    "machine": describe_machine(device)}  # fmt: skip
    summarize(folder, results, settings, device.type)
    return results


if __name__ == "__main__":
    with friendly_errors():
        main()
