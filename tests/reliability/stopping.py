"""Runs that are killed, stopped, starved and disturbed, and then go on: section A of the fault
table. A process of its own, which imports once and forks for every run:

    python tests/reliability/stopping.py FOLDER SHARE [ROW ...]

prints {row: [held, runs, note]} as JSON. SHARE of the table's counts is run (1 is all of them).
"""

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gpt2 import GPT2, GPT2Config
from llama import Llama, LlamaConfig
from minillm import add_lora, mark_only_lora_as_trainable
from minillm.data.batches import Batches, Row
from minillm.errors import friendly_errors
from minillm.losses import token_loss
from minillm.precision import Precision
from minillm.progress import trainable_state
from minillm.runs import Run
from minillm.training import TrainSettings, train

CASES = [(kind, method) for kind in ("gpt2", "llama") for method in ("lora", "full")]
FP32 = Precision("fp32", torch.device("cpu"))


def fork(work: Callable[[], object], errors: Path | None = None) -> int:
    """The process id of a child that does `work` as a script does; what it says goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(errors or os.devnull, "w") as file:
            os.dup2(file.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            with friendly_errors():
                work()
        code = 0
    except SystemExit as ended:
        code = ended.code
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def wait(pid: int) -> int:
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def rows() -> list[Row]:
    """Twelve texts of different lengths."""
    stream = torch.Generator().manual_seed(1)
    found = []
    for n in range(6, 18):
        tokens = torch.randint(64, (n,), generator=stream)
        labels = tokens.clone()
        labels[: n // 2] = -100
        found.append(Row(tokens, labels))
    return found


def training(folder: Path, case: tuple[str, str], **changes) -> Callable[[], None]:
    """A run of 12 steps with dropout, evaluations and early stopping's state, that goes on from
    what is there; in a folder that was never begun it begins."""

    def work() -> None:
        torch.manual_seed(0)
        kind, method = case
        if kind == "gpt2":
            model, targets = GPT2(GPT2Config(16, 2, 2, 64, 32)), ("c_attn",)
        else:
            model, targets = Llama(LlamaConfig(16, 2, 2, 1, 64, 24, max_seq_len=32)), ("wq", "wv")
        if method == "lora":
            add_lora(model, targets, rank=2, alpha=4, dropout=0.2)
            mark_only_lora_as_trainable(model)
        elif kind == "gpt2":
            model.dropout = 0.1
        begun = all((folder / name).exists() for name in ("config.json", "metrics.jsonl"))
        resume = changes.pop("resume", begun)
        run = Run(folder, changes.pop("config", {"lr": 0.01}), resume=resume,
                  identity=changes.pop("identity", None),
                  override=changes.pop("override", False))  # fmt: skip
        settings = {"lr": 0.01, "schedule": "linear", "epochs": 4, "accumulation_steps": 2,
                    "eval_every": 2, "save_every": 0.0, "patience": 50} | changes  # fmt: skip
        batches, held_out = Batches(rows(), 2, 0, 0), Batches(rows()[:3], 1, 0, None)
        train(model, token_loss, batches, held_out, TrainSettings(**settings), FP32, run)
        torch.save(trainable_state(model), folder / "end.bin")

    return work


def outcome(folder: Path) -> tuple:
    """What must be the same to the bit: every step's numbers, and the weights at the end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "grad_norm", "lr", "held_out_loss")
    numbers = [[float(line[k]).hex() if k in line else None for k in keys] for line in lines]
    weights = torch.load(folder / "end.bin", weights_only=True)
    return numbers, {name: value.numpy().tobytes() for name, value in weights.items()}


class Table:
    """References by case, and a fresh folder for every run."""

    def __init__(self, root: Path, share: float):
        self.root, self.share, self.n = root, share, 0
        self.draw = random.Random(0)
        self.rows: dict[str, list] = {}
        self.wanted, self.seconds = {}, {}
        for case in CASES:
            began = time.monotonic()
            folder = self.folder()
            assert wait(fork(training(folder, case))) == 0, "the undisturbed run failed"
            self.wanted[case], self.seconds[case] = outcome(folder), time.monotonic() - began

    def folder(self) -> Path:
        """A new place for a run."""
        self.n += 1
        return self.root / f"run{self.n}"

    def runs(self, n: int) -> range:
        """As many runs as the share says, at least one."""
        return range(max(1, round(n * self.share)))

    def count(self, row: str, n: int, trial: Callable[[int], bool], note: str = "") -> None:
        """Does `trial` so often and notes how often it held."""
        held = [trial(i) for i in self.runs(n)]
        before = self.rows.get(row, [0, 0, ""])
        notes = "; ".join(part for part in (before[2], note) if part)
        self.rows[row] = [before[0] + sum(held), before[1] + len(held), notes]

    def finish(self, folder: Path, case, **changes) -> bool:
        """Goes on to the end; whether it is what a run never stopped is, with nothing left over."""
        if wait(fork(training(folder, case, **changes))) != 0:
            return False
        return outcome(folder) == self.wanted[case] and not list(folder.rglob("*.tmp.*"))


def a1(t: Table) -> None:
    """kill -9 at random moments, up to three times."""

    def trial(i: int) -> bool:
        case, folder = CASES[i % len(CASES)], t.folder()
        for _ in range(t.draw.randint(1, 3)):
            pid = fork(training(folder, case))
            time.sleep(t.draw.random() * t.seconds[case])
            os.kill(pid, signal.SIGKILL)
            wait(pid)
        return t.finish(folder, case)

    t.count("A1", 100, trial, "tiny GPT-2 and Llama, LoRA and full, 1 to 3 kills each")


POINTS = ("before the write", "mid-write", "before fsync", "before replace", "after replace")


def die_at(point: str, save: int) -> None:
    """From now on, the process dies at this point of its save number `save` (0 is the first)."""
    import minillm.files
    import minillm.runs

    plain_save, plain_replace, plain_sync = torch.save, os.replace, minillm.files._sync
    seen = {"n": -1}

    def dying() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save_(state, path):
        seen["n"] += 1
        if seen["n"] == save and point == "before the write":
            dying()
        plain_save(state, path)
        if seen["n"] == save and point == "mid-write":
            os.truncate(path, Path(path).stat().st_size // 2)
            dying()

    def sync(path):
        if seen["n"] == save and point == "before fsync":
            dying()
        plain_sync(path)

    def replace(source, target):
        is_save = str(target).endswith(".pt") and seen["n"] == save
        if is_save and point == "before replace":
            dying()
        plain_replace(source, target)
        if is_save and point == "after replace":
            dying()

    torch.save, os.replace, minillm.files._sync = save_, replace, sync


def a2(t: Table) -> None:
    """kill -9 inside a save, at five points."""

    def trial(i: int) -> bool:
        case, folder = CASES[i % len(CASES)], t.folder()
        point, save = POINTS[i % len(POINTS)], t.draw.randint(0, 12)

        def work() -> None:
            die_at(point, save)
            training(folder, case)()

        return wait(fork(work)) == -signal.SIGKILL and t.finish(folder, case)

    t.count("A2", 50, trial, "5 points x 10")


def a3(t: Table) -> None:
    """Ctrl-C, SIGTERM, and a second Ctrl-C."""

    # nothing is saved but for the signal, and there are steps enough to come in between
    long = {"save_every": 1e9, "eval_every": None, "epochs": 60}
    wanted_ends = {}

    def stopped(folder, case, signals) -> int:
        pid, deadline = fork(training(folder, case, **long)), time.monotonic() + 60
        lines = folder / "metrics.jsonl"
        while not (lines.exists() and lines.read_text()) and time.monotonic() < deadline:
            time.sleep(0.002)  # until the loop runs; a stop before it has nothing to save
        time.sleep(t.draw.random() * 0.05)
        for number in signals:
            os.kill(pid, number)
            time.sleep(0.001)
        return wait(pid)

    def trial(signals, wanted):
        def one(i: int) -> bool:
            case, folder = CASES[i % len(CASES)], t.folder()
            if case not in wanted_ends:
                whole = t.folder()
                wait(fork(training(whole, case, **long)))
                wanted_ends[case] = outcome(whole)
            code = stopped(folder, case, signals)
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
            saved = (folder / f"step_{last:06d}.pt").exists()
            if code != wanted or (len(signals) == 1 and not saved):
                return False
            went_on = wait(fork(training(folder, case, **long))) == 0
            return went_on and outcome(folder) == wanted_ends[case]

        return one

    t.count("A3", 10, trial([signal.SIGINT], 130), "Ctrl-C")
    t.count("A3", 10, trial([signal.SIGTERM], 143), "SIGTERM")
    t.count("A3", 10, trial([signal.SIGINT, signal.SIGINT], 130), "Ctrl-C twice")


def a4(t: Table) -> None:
    """No space for a checkpoint: a limit on the size of files."""

    def trial(i: int) -> bool:
        case, folder, said = CASES[i % len(CASES)], t.folder(), t.root / "said"
        if wait(fork(training(folder, case, max_iters=4, schedule="constant"))) != 0:
            return False
        before = {path.name: path.read_bytes() for path in folder.glob("step_*.pt")}
        limit = 2000 + 500 * i

        def starved() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            training(folder, case)()

        code = wait(fork(starved, said))
        after = {path.name: path.read_bytes() for path in folder.glob("step_*.pt")}
        line = said.read_text().strip().splitlines()[-1]
        named = line.startswith(f"error: {folder}") and "no space left" in line
        return code == 2 and named and after == before and not list(folder.rglob("*.tmp.*"))

    t.count("A4", 10, trial, "file-size limits")


def a5(t: Table) -> None:
    """A folder that cannot be written to, or lies under a file."""

    def refused(i: int) -> bool:
        folder, said = t.folder(), t.root / "said"
        if i == 0:
            folder.mkdir()
            folder.chmod(0o555)
        else:
            folder.write_text("a file")
            folder = folder / "run"

        def work() -> None:
            if os.geteuid() == 0:  # whom no mode bits stop
                os.setuid(65534)
            training(folder, CASES[0], resume=False)()

        code = wait(fork(work, said))
        return code == 2 and said.read_text().startswith(f"error: {folder}")

    t.root.chmod(0o755)
    held = [refused(i) for i in range(2)]
    t.rows["A5"] = [sum(held), 2, "read-only; under a file (a missing folder is made)"]


def a6(t: Table) -> None:
    """Two runs on one folder."""

    def trial(i: int) -> bool:
        case, folder, said = CASES[i % len(CASES)], t.folder(), t.root / "said"

        def holding() -> None:
            held = Run(folder, {"lr": 0.01})
            time.sleep(60)
            del held

        pid = fork(holding)
        while not (folder / ".lock").exists() or not (folder / ".lock").read_text():
            time.sleep(0.01)
        time.sleep(0.05)
        second = wait(fork(training(folder, case, resume=True), said))
        line = said.read_text()
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        return second == 2 and f"in use by pid {pid}" in line and t.finish(folder, case)

    t.count("A6", 3, trial)


def a7(t: Table) -> None:
    """A damaged newest checkpoint; all of them damaged."""

    def damage(path: Path, how: int) -> None:
        data = bytearray(path.read_bytes())
        if how == 0:
            data = data[: t.draw.randrange(1, len(data))]
        elif how == 1:
            data[t.draw.randrange(len(data))] ^= 1 << t.draw.randrange(8)
        else:
            data = b""
        path.write_bytes(data)

    def trial(i: int) -> bool:
        case, folder, said = CASES[i % len(CASES)], t.folder(), t.root / "said"
        pid, deadline = fork(training(folder, case)), time.monotonic() + 60
        while len(list(folder.glob("step_*.pt"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        newest, older = sorted(folder.glob("step_*.pt"), reverse=True)[:2]
        damage(newest, i % 3)
        whole = (folder / "metrics.jsonl").read_text()
        if not t.finish(folder, case):  # warned and fell back, or the flip hit what is not read
            return False
        if i % 10:
            return True
        for path in folder.glob("step_*.pt"):
            path.write_bytes(b"")
        (folder / "metrics.jsonl").write_text(whole)
        return wait(fork(training(folder, case), said)) == 2 and "damaged" in said.read_text()

    t.count("A7", 30, trial, "10 cut, 10 with a flipped bit, 10 empty")


def a8(t: Table) -> None:
    """Resumed with something changed: config, and the hashes of model and data."""
    folder, case = t.folder(), CASES[0]
    identity = {"model": "m", "data": "d"}
    begun = {"lr": 0.01, "batch-size": 2, "seed": 0, "frozen-dtype": "auto"}
    assert wait(fork(training(folder, case, config=begun, identity=identity, max_iters=4,
                              schedule="constant"))) == 0  # fmt: skip
    held = []

    def again(config, identity, **changes) -> tuple[int, str]:
        said = t.root / "said"
        code = wait(fork(training(folder, case, config=config, identity=identity, max_iters=4,
                                  schedule="constant", **changes), said))  # fmt: skip
        return code, said.read_text()

    for name, value in (("lr", 0.02), ("batch-size", 3), ("seed", 1), ("frozen-dtype", "fp32")):
        code, said = again(begun | {name: value}, identity)
        allowed, warned = again(begun | {name: value}, identity, override=True)
        held.append(code == 2 and f"--{name}" in said and allowed == 0 and "warning" in warned)
        (folder / "config.json").write_text(json.dumps(begun))
    for name in identity:
        code, said = again(begun, identity | {name: "other"})
        held.append(code == 2 and f"another {name}" in said)
    path = max(folder.glob("step_*.pt"))
    state = torch.load(path, weights_only=True)
    torch.save(state | {"versions": {"torch": "1.0"}}, path)
    code, said = again(begun, identity)
    held.append(code == 0 and "not bit-identical" in said)
    t.rows["A8"] = [sum(held), 7, "lr, batch, seed, dtype; model, data; torch version"]


def a9(t: Table) -> None:
    """A finished run resumed, and with more steps."""
    folder, case = t.folder(), CASES[0]
    short = {"max_iters": 6, "schedule": "constant"}
    codes = [wait(fork(training(folder, case, **short))) for _ in range(2)]
    first = (folder / "metrics.jsonl").read_text()
    codes.append(wait(fork(training(folder, case, schedule="constant"))))
    longer = (folder / "metrics.jsonl").read_text()
    held = [codes == [0, 0, 0] and len(first.splitlines()) == 6,
            longer.startswith(first) and len(longer.splitlines()) == 12]  # fmt: skip
    t.rows["A9"] = [sum(held), 2, "complete; continued"]


def main() -> None:
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports what preflight would import
    table = Table(Path(sys.argv[1]), float(sys.argv[2]))
    rows = {row.__name__: row for row in (a1, a2, a3, a4, a5, a6, a7, a8, a9)}
    for row in [rows[name] for name in sys.argv[3:] or rows]:
        began = time.monotonic()
        row(table)
        print(f"{row.__name__} {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps(table.rows))


if __name__ == "__main__":
    main()
