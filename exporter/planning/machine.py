"""What this machine has to offer: memory within the limits of a container, and disk."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from vlmq.exporter.evaluation.memory import resident


@dataclass(frozen=True)
class _Files:
    """Where a version of Linux' control groups says what a group may use and uses (cgroups(7))."""

    controller: str  # in /proc/self/cgroup
    folder: str  # below the mount
    limit: str
    usage: str
    cache: str  # the entry of memory.stat that can be had back


VERSIONS = (
    _Files("", "", "memory.max", "memory.current", "inactive_file"),
    _Files("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may come to have: what it has, and what is left in the system and its control group."""
    left = [psutil.virtual_memory().available]
    lines = groups.read_text().splitlines() if groups.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        for files in VERSIONS:
            if files.controller in controllers.split(","):
                left += _left(mount / files.folder, path, files)
    return resident() + min(left)


def _left(mount: Path, path: str, files: _Files) -> Iterator[int]:
    """What is left in the group and in each of those it lies in. Inside a container the mount is the group itself."""
    for folder in dict.fromkeys([mount, *(mount / path.strip("/")).parents, mount / path.strip("/")]):
        limit, usage, stat = folder / files.limit, folder / files.usage, folder / "memory.stat"
        if mount in (folder, *folder.parents) and limit.is_file() and usage.is_file():
            allowed = limit.read_text().strip()
            entries = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
            if allowed != "max":
                yield int(allowed) - int(usage.read_text()) + int(entries.get(files.cache, 0))


def free_disk(place: Path) -> int:
    """Bytes that can be written at a place that need not exist yet.

    Where nothing can be stored at all, as in /proc, it is for the writer to say so, and not for want of room.
    """
    existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    usage = psutil.disk_usage(str(existing))
    return usage.free if usage.total else sys.maxsize
