"""What a machine can do at all: the yardstick of tools/benchmark.py."""

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from minillm.linear import linear
from minillm.memory import MIB, free_mib
from minillm.precision import DTYPES


def product_rate(device: torch.device, dtype: str) -> float:
    """Operations per second of a large matrix product by the faster of PyTorch's libraries."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(DTYPES[dtype])
    with torch.no_grad():
        seconds = min(median_seconds(lambda: a @ a, device),
                      median_seconds(lambda: linear(a, a), device))  # fmt: skip
    return 2 * n**3 / seconds


def read_rate(device: torch.device) -> float:
    """Bytes per second of summing what no cache holds (4 GiB of a GPU that has so much free)."""
    on_gpu = device.type == "cuda"
    n_numbers = min(2**30, int(free_mib(device) * MIB) // 8) if on_gpu else 2**27
    big = torch.ones(n_numbers, device=device)
    rate = big.nbytes / median_seconds(big.sum, device)
    del big
    if on_gpu:
        torch.cuda.empty_cache()  # the engines need the room
    return rate


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    """Median time of a call, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def startup_seconds(repeats: int = 5) -> Iterator[tuple[str, str, str, dict]]:
    """What a user waits for before anything happens: imports, and a first token of tiny-llama."""
    tool = Path(__file__).parent / "generate.py"
    commands = {
        "torch": ["-c", "import torch"],
        "ours": ["-c", "import torch, minillm, llama, gpt2"],
        "token": [str(tool), "--prompt", "One morning", "--max-new-tokens", "1"],
    }
    seconds = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    extra = [b - a for a, b in zip(seconds["torch"], seconds["ours"], strict=True)]
    yield "imports, beyond torch's", "", "s", {"minillm": extra}
    yield "from start to tiny-llama's first token", "", "s", {"minillm": seconds["token"]}


def describe_machine(device: torch.device) -> dict:
    """What the figures depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name)
                for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name)}
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(), **versions,
    }  # fmt: skip
