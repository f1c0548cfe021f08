"""Resident memory of this process, now and at its highest, in bytes."""

import contextlib
import sys
from pathlib import Path

import psutil


def resident() -> int:
    """What is in physical memory now, files mapped and read included."""
    return psutil.Process().memory_info().rss


def forget_peak() -> None:
    """Let the peak start anew from here, where the system can (Linux); elsewhere it is that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the resident size


def peak() -> int:
    """The highest resident size since `forget_peak`."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024  # getrusage(2): bytes there, KiB elsewhere
