"""Bytes by category: what a run holds and what its peak was. All figures in MiB (2^20 bytes)."""

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import torch
from torch import nn

MIB = 2**20


def used_mib(device: torch.device) -> float:
    """Memory in use now: allocated on a GPU, resident for the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    return _proc_status("VmRSS") or _max_rss()


def reset_peak(device: torch.device) -> float:
    """Starts a new peak measurement; returns what is in use now, to be subtracted on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier work has freed (glibc)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak resident size
    return used_mib(device)


def peak_mib(device: torch.device) -> float:
    """The peak since reset_peak: allocated on a GPU, resident for the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return _proc_status("VmHWM") or _max_rss()


def memory_by_category(
    model: nn.Module, optimizer: torch.optim.Optimizer, peak: float
) -> dict[str, float]:
    """MiB of weights, gradients and optimizer state; the rest of `peak` is activations and work.

    Gradients are counted as they stand at the peak: one per trainable tensor.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    states = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    parts = {
        "frozen weights": _mib(frozen),
        "trainable weights": _mib(trainable),
        "gradients": _mib(trainable),
        "optimizer state": _mib(states),
    }
    parts["activations and work"] = max(0.0, peak - sum(parts.values()))
    return parts | {"peak": peak}


def _mib(tensors) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / MIB


def _proc_status(field: str) -> float:
    """A size of this process in MiB from /proc, 0 where there is none (macOS)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith(field + ":")), 0.0)


def _max_rss() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
