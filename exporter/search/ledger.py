"""The folder of a sweep: what it depends on, what was measured, and the pieces; a killed sweep goes on from it.

    sweep.json       what the rows depend on; another sweep's folder is refused
    rows.jsonl       a line for each measurement or failure, on the disk before the next is begun
    pieces/KEY/      quantized components

A line that was cut short (formats/json_lines.py) is measured anew.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vlmq.exporter.errors import VlmqError
from vlmq.formats import json_lines
from vlmq.formats.folder import full_disk_in_words, sync

IDENTITY, ROWS, PIECES = "sweep.json", "rows.jsonl", "pieces"
ATTEMPTS = 2  # a failure is tried once more

Line = dict[str, Any]


class Ledger:
    """scores: of each configuration that was measured. failures: message of the last, and how many there were."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scores: dict[str, dict[str, float]] = {}
        self.failures: dict[str, str] = {}
        self.attempts: Counter[str] = Counter()
        for line in json_lines.read(folder / ROWS):
            self._take_in(line)

    @property
    def pieces(self) -> Path:
        return self.folder / PIECES

    def is_open(self, key: str) -> bool:
        """Whether a configuration is still to be measured."""
        return key not in self.scores and self.attempts[key] < ATTEMPTS

    def append(self, line: Line) -> None:
        """A line, on the disk when this returns."""
        with full_disk_in_words(self.folder):
            json_lines.append(self.folder / ROWS, line)
        self._take_in(line)

    def _take_in(self, line: Line) -> None:
        if "scores" in line:
            self.scores[line["key"]] = line["scores"]
        else:
            self.failures[line["key"]] = line["failed"]
            self.attempts[line["key"]] += 1


@contextmanager
def opened(folder: Path, identity: Mapping[str, Any]) -> Iterator[Ledger]:
    """The ledger of a sweep in `folder`: the one that an equal sweep left there, or a new one.

    VlmqError where another sweep's, or anything else, lies there, or where one is under way.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.parent.is_dir():
        raise VlmqError(f"{folder.parent}: no such folder; create it or choose another --out")
    _refuse_another(folder, identity)
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise VlmqError(f"{folder}: a sweep to it is under way; wait for it, or choose another --out") from None
    try:
        with full_disk_in_words(folder):
            if not (folder / IDENTITY).exists():
                part = folder / f"{IDENTITY}.part"
                part.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
                sync(part)
                part.rename(folder / IDENTITY)
            (folder / PIECES).mkdir(exist_ok=True)
            for left in (folder / PIECES).glob(".*.partial-*"):  # of a sweep that was killed
                shutil.rmtree(left)
            sync(folder)
        yield Ledger(folder)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _refuse_another(folder: Path, identity: Mapping[str, Any]) -> None:
    if not folder.exists():
        return
    try:
        found = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_dir() and not any(entry for entry in folder.iterdir() if entry.name != ".lock"):
            return
        raise VlmqError(f"{folder}: exists already and is no sweep's; choose another --out") from None
    except ValueError as error:
        raise VlmqError(f"{folder / IDENTITY}: cannot be read ({error}); choose another --out") from None
    said = json.loads(json.dumps(identity))
    differing = sorted(key for key in said.keys() | found.keys() if said.get(key) != found.get(key))
    if differing:
        raise VlmqError(
            f"{folder}: holds a sweep with another {', '.join(differing)}; finish that one with its command, "
            "or choose another --out"
        )
