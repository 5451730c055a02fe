"""README says only what works: its commands parse, its code runs, its breakpoint is the softmax."""

import importlib
import re
import shlex

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


def test_its_breakpoint_is_the_softmax():
    line = int(re.search(r"break minillm/attention.py:(\d+)", README)[1])
    assert "torch.softmax" in (ROOT / "minillm/attention.py").read_text().splitlines()[line - 1]


def test_nothing_was_left_to_fill_in():
    assert "@@" not in README
