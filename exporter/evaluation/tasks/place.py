"""Where the official files of a task are: the folder that was named, or a file in it, and the split that is meant."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmq.exporter.errors import VlmqError


@dataclass(frozen=True)
class Place:
    """A folder, or one file of it, as named; split: part of the names of the files that are meant, if several fit."""

    path: Path
    split: str | None = None

    def file(self, what: str, patterns: Sequence[str]) -> Path:
        """The one file that fits a pattern; VlmqError where none or several do."""
        if self.path.is_file():
            return self.path
        found = sorted({path for pattern in patterns for path in self.path.glob(pattern) if path.is_file()})
        meant = [path for path in found if self.split in path.name] if self.split and len(found) > 1 else found
        if not meant:
            names = " or ".join(patterns)
            said = f" with {self.split} in its name" if found else ""
            raise VlmqError(f"{self.path}: no {what}{said}; put {names} there, or name the folder that has it")
        if len(meant) > 1:
            raise VlmqError(f"{self.path}: both {meant[0].name} and {meant[1].name}; say which with --split")
        return meant[0]

    def beside(self, file: Path, what: str, patterns: Sequence[str]) -> Path:
        """The file that belongs to `file`: in its folder, of the same split."""
        return Place(file.parent, self.split).file(what, patterns)
