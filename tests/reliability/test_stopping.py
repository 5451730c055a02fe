"""Section A: killed, stopped, starved and disturbed runs. The whole of it, and a short part."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT


def run_table(folder, share: float, *rows: str) -> dict:
    script = str(ROOT / "tests/reliability/stopping.py")
    command = [sys.executable, script, str(folder), str(share), *rows]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def counted(rows: dict, tally) -> None:
    for row, (held, runs, note) in rows.items():
        results = {i: True if i < held else "differed" for i in range(runs)}
        tally(row, results, note)


@pytest.mark.reliability
def test_every_stopped_run_goes_on_bit_identically(tmp_path, tally):
    counted(run_table(tmp_path, 1.0), tally)


SCRIPTS = {
    "finetune_llama": ["--layers", "1", "--samples", "48", "--held-out", "4"],
    "finetune_gpt2": ["--samples", "48", "--held-out", "4", "--accumulation-steps", "2"],
    "dpo": ["--layers", "1", "--samples", "96", "--held-out", "8"],
}


def lines_of(folder) -> list:
    """Every step's loss and gradient norm, to the bit."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"].hex(), row["grad_norm"].hex()) for row in rows]


@pytest.mark.reliability
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_script_that_is_stopped_goes_on_bit_identically(script, number, tmp_path):
    command = [sys.executable, str(ROOT / "train" / f"{script}.py"), *SCRIPTS[script], "--epochs",
               "3", "--save-every", "0", "--lr", "0.001", "--out-dir"]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    assert subprocess.run([*command, str(tmp_path / "whole")], **quiet).returncode == 0
    folder = tmp_path / "part"
    child = subprocess.Popen([*command, str(folder)], **quiet)
    while len(list(folder.glob("step_*.pt"))) < 2 and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(number)
    assert child.wait() == (-number if number == signal.SIGKILL else 128 + number)
    assert len(lines_of(folder)) < len(lines_of(tmp_path / "whole"))
    assert subprocess.run([*command, str(folder), "--resume"], **quiet).returncode == 0
    assert lines_of(folder) == lines_of(tmp_path / "whole")


def test_a_few_kills_and_stops(tmp_path, tally, monkeypatch):
    monkeypatch.delenv("RELIABILITY_TALLY", raising=False)
    counted(run_table(tmp_path, 0.02, "a1", "a2", "a3", "a6"), tally)
