"""Memory that is freed is no longer resident."""

import platform
import subprocess
import sys

import pytest

# Tensors of 16 MB, each followed by one of 100 kB that stays: what heaps cannot give back from their end alone.
HOLES = """
import sys, torch
from vlmq.exporter import heap
from vlmq.exporter.evaluation.memory import resident
if sys.argv[1] == "given back":
    heap.give_back()
torch.ones(30 * 2**18)  # mapped apart, and freed: glibc takes its size as the next threshold
before = resident()
large, small = [], []
for _ in range(16):
    large.append(torch.ones(16 * 2**18))
    small.append(torch.ones(25 * 2**10))
large.clear()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give back by themselves, or cannot")
def test_what_is_freed_between_what_is_kept_goes_back_to_the_system():
    kept, given = (
        int(subprocess.run([sys.executable, "-c", HOLES, how], check=True, capture_output=True, text=True).stdout)
        for how in ("kept", "given back")
    )
    assert kept > 200 * 2**20  # the holes, or this test shows nothing
    assert given < 20 * 2**20
