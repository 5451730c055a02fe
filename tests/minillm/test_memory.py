"""What a process holds and its peak, by Linux's own counts."""

import gc
import os

import pytest
import torch

from minillm.memory import MIB, peak_mib, reset_peak

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system resets no peaks"
)


def test_the_peak_is_what_was_held_at_once_since_the_reset():
    before = reset_peak(CPU)
    for n_mib in (96, 16):
        torch.ones(n_mib * MIB // 4)
    assert peak_mib(CPU) - before == pytest.approx(96, abs=8)


def test_what_earlier_work_left_in_cycles_does_not_lower_the_peak():
    gc.disable()
    try:
        left = [torch.ones(64 * MIB // 4)]
        left.append(left)
        del left
        before = reset_peak(CPU)
        gc.collect()
        torch.ones(32 * MIB // 4)
        assert peak_mib(CPU) - before == pytest.approx(32, abs=8)
    finally:
        gc.enable()
