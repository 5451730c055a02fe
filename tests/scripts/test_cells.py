"""Runs of an experiment, each a process of its own, and how one ends."""

import pytest

from minillm.adapt.methods import METHODS
from minillm.errors import NumericError, UserError
from tools.cells import OutOfMemory, check_run, run_script
from tools.models import FAMILIES

ENDS = {
    "killed by the system": ("import os; os.kill(os.getpid(), 9)", OutOfMemory),
    "out of memory": (
        "import sys; sys.exit(print('error: out of memory: 9 GiB', file=sys.stderr) or 2)",
        OutOfMemory,
    ),
    "the user's to fix": (
        "import sys; sys.exit(print('error: x.json: no such file', file=sys.stderr) or 2)",
        UserError,
    ),
    "diverged": ("import sys; sys.exit(print('error: NaN', file=sys.stderr) or 3)", NumericError),
}


@pytest.mark.parametrize(("code", "kind"), ENDS.values(), ids=ENDS)
def test_a_run_that_fails_says_how(code, kind, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(code)
    with pytest.raises(kind) as caught:
        run_script(script, tmp_path / "cell", [])
    assert type(caught.value) is kind and str(tmp_path / "cell") in str(caught.value)


def test_a_run_that_ended_is_not_done_again(tmp_path):
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell" / "summary.json").write_text("{}")
    run_script(tmp_path / "no such script.py", tmp_path / "cell", [])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_method_may_begin_on_every_model(family, method):
    check_run(family, ["--method", method, "--add-biases"])


@pytest.mark.parametrize("flags", [
    ["--rank", "999"], ["--targets", "nope"], ["--bottleneck", "x"],
    ["--method", "prefix_tuning", "--virtual-tokens", "600"],
    ["--template", "poem"], ["--dropout", "0.1"], ["--device", "abacus"],
    ["--method", "full", "--frozen-dtype", "bf16"],
])  # fmt: skip
def test_a_run_that_could_not_begin_is_refused_before_any(flags):
    with pytest.raises(UserError):
        check_run(next(family for family in FAMILIES if family.name == "llama"), flags)
