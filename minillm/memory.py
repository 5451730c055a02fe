"""What a process holds, and its peak, in MiB (2^20 bytes). By category: footprint.py."""

import contextlib
import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import torch

from minillm.errors import UserError

MIB = 2**20


def used_mib(device: torch.device) -> float:
    """Memory in use now: allocated on a GPU, resident for the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    return _read("/proc/self/status", "VmRSS:") / 1024 or _max_rss()


def reset_peak(device: torch.device) -> float:
    """Starts a new peak measurement; returns what is in use now, to be subtracted on a CPU."""
    gc.collect()  # what earlier work left in cycles would count as in use, and be freed under way
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier work has freed (glibc)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak resident size
    return used_mib(device)


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU: has glibc keep what a step frees (blocks up to 64 MiB, or the 32 that older ones
    allow) for the next one, in place of giving it back to the system, which clears every page anew:
    24,000 page faults a step of GPT-2 124M in fp32, 5 to 15 % of its time; the peak rises by 2 to
    4 %. For the whole process; nothing where the C library is another."""
    if device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            # M_MMAP_THRESHOLD first: the other alone stops glibc from raising this one by itself
            if libc.mallopt(-3, 2**26) or libc.mallopt(-3, 2**25):
                libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def peak_mib(device: torch.device) -> float:
    """The peak since reset_peak: allocated on a GPU, resident for the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return _read("/proc/self/status", "VmHWM:") / 1024 or _max_rss()


def reserved_mib(device: torch.device) -> float | None:
    """The peak that PyTorch took from a GPU, with what its allocator keeps in reserve."""
    return torch.cuda.max_memory_reserved(device) / MIB if device.type == "cuda" else None


def free_mib(device: torch.device) -> float:
    """Memory that may still be taken: of the GPU, or of the machine or what of it a container may
    use (0 where that is not known)."""
    if device.type == "cuda":
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + spare) / MIB
    free = _read("/proc/meminfo", "MemAvailable:") / 1024
    container = "/sys/fs/cgroup/memory"
    limit, used = _read(f"{container}.max"), _read(f"{container}.current")
    for field in ("inactive_file", "active_file"):  # what it keeps of files, it gives back
        used -= _read(f"{container}.stat", field)
    return min(free, max(0.0, (limit - used) / MIB)) if limit and used else free


def check_fits(
    what: str, n_bytes: int, device: torch.device | str, remedy: str = "a narrower dtype"
) -> None:
    """Errors: UserError, before anything is allocated, if there is not that much memory."""
    device = torch.device(device)
    free = 0.0 if device.type == "meta" else free_mib(device)
    if free and n_bytes / MIB > free:
        raise UserError(f"{what}: out of memory: needs {n_bytes / MIB:,.0f} MiB on {device}, "
                        f"{free:,.0f} are free; add --layers N, or {remedy}")  # fmt: skip


def _read(path: str, field: str = "") -> int:
    """The number in a file of Linux's, or beside a field in one; 0 where there is none (macOS)."""
    try:
        found = re.search(rf"^{field}\s*(\d+)", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _max_rss() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
