"""Tensors that wait between blocks: in memory up to a limit, in files beyond it.

With a folder they can be made durable, so that a run that was killed goes on from them.
"""

import os
import re
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmq.exporter.errors import VlmqError
from vlmq.formats.folder import sync

MEMORY = 2**30  # bytes of them that stay in memory unless another limit is given


@dataclass(eq=False)
class Kept:
    """One tensor, in memory or in a file, or in both."""

    tensor: Tensor | None = None
    file: Path | None = None

    def read(self) -> Tensor:
        if self.tensor is not None:
            return self.tensor
        assert self.file is not None
        try:
            return load_file(self.file)["x"]
        except (SafetensorError, OSError) as error:
            raise VlmqError(f"{self.file}: cannot be read ({error}); pass --fresh to begin anew") from error


class Activations:
    """Where such tensors lie. Files of tensors that nothing holds any more are removed by `sweep`."""

    def __init__(self, folder: Path | None = None, limit: int = MEMORY) -> None:
        """folder: for files; None: everything stays in memory. limit: bytes that may."""
        self.folder, self.limit = folder, limit
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._held = 0
        # What an earlier run left is not written over: it may go on from there.
        earlier = [int(file.stem) for file in folder.glob("*.safetensors")] if folder else []
        self._written = max(earlier, default=-1) + 1
        self._kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(self, tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        self._kept.add(kept)
        if self.folder is not None and self._held + tensor.nbytes > self.limit:
            self._write(kept)
            kept.tensor = None
            return kept
        self._held += tensor.nbytes
        weakref.finalize(kept, self._let_go, tensor.nbytes)
        return kept

    def restore(self, name: str) -> Kept:
        """What an earlier run left in a file, by the name that `save` gave."""
        assert self.folder is not None
        kept = Kept(file=self.folder / name)
        self._kept.add(kept)
        return kept

    def save(self, kept: Iterable[Kept]) -> list[str]:
        """Make tensors durable; the names of their files."""
        names = []
        for each in kept:
            if each.file is None:
                self._write(each)
            assert each.file is not None
            sync(each.file)
            names.append(each.file.name)
        return names

    def sweep(self) -> None:
        """Remove the files that no tensor lies in any more."""
        live = {kept.file for kept in self._kept}
        for file in self.folder.iterdir() if self.folder else ():
            if file not in live:
                file.unlink()

    def _write(self, kept: Kept) -> None:
        assert self.folder is not None
        assert kept.tensor is not None
        kept.file = self.folder / f"{self._written:08}.safetensors"
        self._written += 1
        save({"x": kept.tensor}, kept.file)

    def _let_go(self, count: int) -> None:
        self._held -= count


def save(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. OSError where the disk is full, of which safetensors tells in words alone."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
