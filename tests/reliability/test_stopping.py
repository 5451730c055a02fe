"""Section A: killed, stopped, starved and disturbed runs. The whole of it, and a short part."""

import json
import subprocess
import sys

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


def test_a_few_kills_and_stops(tmp_path, tally, monkeypatch):
    monkeypatch.delenv("RELIABILITY_TALLY", raising=False)
    counted(run_table(tmp_path, 0.02, "a1", "a2", "a3", "a6"), tally)
