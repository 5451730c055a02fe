"""README says only what works: its commands parse, its code runs, its breakpoint is the softmax."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python (train|tools)/(\w+)\.py([^\n`#)]*)", README)))


@pytest.mark.parametrize(("room", "script", "flags"), COMMANDS)
def test_its_commands_parse(room, script, flags):
    importlib.import_module(f"{room}.{script}").parse_args(shlex.split(flags))


def test_its_python_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(code, "README.md", "exec"), {})


def test_its_house_names_every_file_under_its_room():
    house = README.partition("## The house")[2].partition("checkpoints/ ")[0]
    missing, rooms = [], []
    for part in re.split(r"^(?=\w+/)", house, flags=re.M)[1:]:  # a room's name stands at the left
        words = set(re.findall(r"\w+", part))
        for room in re.findall(r"(\w+)/", part.split("  ")[0]):
            files = [p for p in (ROOT / room).rglob("[!_]*.py") if "data" not in p.parts]
            missing += [path for path in files if path.stem not in words]
            rooms.append(room)
    assert rooms == ["minillm", "llama", "gpt2", "phi", "train", "tools"] and missing == []


def test_its_walk_with_the_debugger_ends_at_the_softmax(tmp_path):
    walk = README.partition("python -m pdb ")[2].partition("```")[0]
    command, *asked = walk.replace("(Pdb) ", "").strip().splitlines()
    few = ["--samples", "8", "--held-out", "4", "--out-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "pdb", *shlex.split(command), *few], cwd=ROOT, text=True,
        input="\n".join([*asked, "quit", "quit"]), capture_output=True, timeout=120,
    )  # fmt: skip
    where = done.stdout.rpartition("\n> ")[0] or done.stdout
    for frame in ("main()", "train()", "token_loss()", "forward()", "causal_attention()"):
        assert frame in where
    assert "-> weights = torch.softmax(" in done.stdout


def test_nothing_was_left_to_fill_in():
    assert "@@" not in README
