"""The house itself: who may import whom, and what every public name tells."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ALLOWED = {
    "minillm": {"minillm"},
    "llama": {"minillm", "llama"},
    "gpt2": {"minillm", "gpt2"},
    "phi": {"minillm", "phi"},
    "train": {"minillm", "llama", "gpt2", "phi", "train"},
    "tools": {"minillm", "llama", "gpt2", "phi", "tools"},
}
PEERS = {"transformers", "peft", "accelerate", "lightning", "datasets"}


def sources() -> list[Path]:
    return [path for room in ALLOWED for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """First words of everything a file imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its room"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    room = path.relative_to(ROOT).parts[0]
    assert imported(path) & set(ALLOWED) <= ALLOWED[room]
    is_benchmark = path.name == "peers.py"  # the one place outside the tests that may
    assert is_benchmark or not imported(path) & PEERS


def test_tests_run_where_the_peers_are_not_installed():
    """They reach them by importorskip: an import would end the whole suite."""
    tests = sorted((ROOT / "tests").rglob("*.py"))
    assert not [path.name for path in tests if imported(path) & PEERS]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_args_never_leaves_main(path):
    """In a script, no function takes the parsed flags whole: each names what it needs."""
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call):
            whole = [a for a in call.args if isinstance(a, ast.Name) and a.id == "args"]
            assert not whole or ast.unparse(call.func) in ("settings_of", "vars"), ast.unparse(call)


def test_public_names_carry_docstrings():
    import gpt2
    import llama
    import minillm

    for module in (gpt2, llama, minillm):
        for name in module.__all__:
            assert inspect.getdoc(getattr(module, name)), name


@pytest.mark.parametrize("script", ["tools/scaling_laws", "tools/lora_budget", "tools/extract_lora",
    "tools/trace", "tools/explain", "tools/generate", "train/dpo", "train/finetune_phi"])
def test_what_runs_a_formula_cites_its_source(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    assert re.search(r"[A-Z]\w+ (et\s+al\.|& [A-Z]\w+) (19|20)\d\d", ast.get_docstring(tree))


def test_importing_the_engine_imports_no_plotting_and_no_peer():
    code = "import gpt2, llama, minillm, sys; print(*{m.split('.')[0] for m in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(out.stdout.split()) & (PEERS | {"matplotlib", "huggingface_hub"})


def test_a_training_step_does_not_import_the_compiler():
    """PyTorch's own AdamW does, at its first call: 820 modules, 70 MiB, a second."""
    code = (
        "import sys, torch\n"
        "from minillm.optimizer import AdamW\n"
        "p = torch.ones(3, requires_grad=True)\n"
        "optimizer = AdamW([p], fused=True)\n"
        "p.sum().backward()\n"
        "optimizer.step()\n"
        "optimizer.zero_grad()\n"
        "optimizer.load_state_dict(optimizer.state_dict())\n"
        "assert p[0] < 1 and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
