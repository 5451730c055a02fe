"""Runs the whole reliability suite and writes its table.

    python tests/reliability/report.py docs/results/reliability.md
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

FAULTS = {
    "A1": "kill -9 at a random moment, resume until done", "A2": "kill -9 inside a save",
    "A3": "Ctrl-C, SIGTERM, a second Ctrl-C", "A4": "no space for a checkpoint",
    "A5": "a folder that cannot be written to", "A6": "two runs on one folder",
    "A7": "a damaged newest checkpoint", "A8": "resumed with something changed",
    "A9": "a finished run resumed, or given more steps", "B1": "forged safetensors files",
    "B2": "forged .pth and .bin files", "B3": "malicious pickles",
    "B4": "bit flips in a published file", "B5": "wrong keys", "B6": "wrong index files",
    "B7": "impossible configs", "C1": "1,000 eval() and train()", "C2": "saved while merged",
    "C3": "LoRA that cannot be added", "C4": "an adapter on another base",
    "C5": "checkpointed gradients", "C6": "accumulation against one batch",
    "D1": "broken data", "D2": "samples that do not fit", "D3": "control tokens in text",
    "D4": "tokens beyond the model", "E1": "fp16 overflows", "E2": "losses that are no number",
    "E3": "out of GPU memory", "F1": "sampling settings", "F2": "prompts of any length",
    "F3": "KV cache on against off", "F4": "streamed emoji and CJK",
    "G1": "downloads that break", "G2": "file names that lead astray", "G3": "offline",
}  # fmt: skip


def main() -> int:
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        tally, began = Path(folder) / "tally.jsonl", time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "reliability", "tests/reliability", "-q"],
            env=os.environ | {"RELIABILITY_TALLY": str(tally)},
        )  # fmt: skip
        minutes = (time.monotonic() - began) / 60
        counts: dict[str, list] = {}
        for line in tally.read_text().splitlines():
            row, held, runs, note = json.loads(line)
            before = counts.get(row, [0, 0, note])
            counts[row] = [before[0] + held, before[1] + runs, note]
    lines = []
    for row, fault in FAULTS.items():
        held, runs, note = counts.get(row, [0, 0, "needs a GPU" if row == "E3" else "CRASHED"])
        lines.append(f"| {row} | {fault} | {held}/{runs} | {note} |")
    where = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, "
    where += f"torch {torch.__version__}"
    head = f"Made by `python tests/reliability/report.py {target}`:\n{minutes:.1f} minutes, "
    head += f"{where}, "
    table = "| row | fault | held / runs | note |\n| --- | --- | --- | --- |\n" + "\n".join(lines)
    target.write_text(f"# Reliability\n\n{head}{datetime.date.today()}.\n\n{table}\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
