"""The journal of an export: what is finished, durable after every block, so that a killed run goes on from there.

A folder beside the output. A step writes the blocks it finished and the hidden states behind them, each to the disk
(write, fsync, rename), then `state.json`, whose rename is the moment the step counts. What `state.json` does not name
does not exist.

    journal.json            what the run depends on; another run's journal is refused
    state.json              how many blocks are finished, and where the hidden states lie
    blocks/00012.safetensors, activations/00000345.safetensors

With several workers each has a folder of activations (activations-1, ...), and the first writes the rest.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmq.exporter import workers
from vlmq.exporter.activations import Activations, save
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.solving import QuantizedBlock, Schemes, Solved
from vlmq.exporter.walk import Block
from vlmq.formats.folder import full_disk_in_words, sync
from vlmq.kernels.grid import Limits, QuantizedWeight

State = dict[str, Any]  # of the hidden states, as `Calibration.state` says it


class Journal:
    """A run's journal: `done` blocks are finished, and `state` is what lies behind them (None: nothing yet)."""

    def __init__(self, folder: Path, limit: int) -> None:
        """folder: of a journal that is this run's. limit: bytes of activations that stay in memory."""
        self.folder = folder
        (folder / "blocks").mkdir(exist_ok=True)
        name = f"activations-{workers.rank()}" if workers.rank() else "activations"
        self.activations = Activations(folder / name, limit)
        found = _read(folder / "state.json") or {"done": 0, "state": None}
        self.done: int = found["done"]
        self.state: State | None = found["state"]

    def blocks(self, blocks: Sequence[Block], schemes: Schemes) -> Iterator[QuantizedBlock]:
        """The finished ones, of those that the walk has."""
        for index in range(self.done):
            yield read_block(self._file(index), blocks[index], schemes)

    def step(self, finished: Sequence[QuantizedBlock], state: State | None) -> None:
        """Blocks that follow those that are done, and the names of the files that `activations` saved behind them."""
        if state is not None and self.activations.folder:
            sync(self.activations.folder)
        workers.wait()
        if not workers.rank():
            for index, block in enumerate(finished, start=self.done):
                write_block(block, self._file(index))
            sync(self.folder / "blocks")
            _write(self.folder / "state.json", {"done": self.done + len(finished), "state": state})
        workers.wait()  # before anything that the last state names is removed
        self.done += len(finished)
        self.state = state
        self.activations.sweep()

    def _file(self, index: int) -> Path:
        return self.folder / "blocks" / f"{index:05}.safetensors"


def folder_of(output: Path) -> Path:
    """Where the journal of an export to `output` lies."""
    output = Path(os.path.abspath(output))
    return output.with_name(f".{output.name}.journal")


@contextmanager
def journaled(output: Path, identity: Mapping[str, Any], limit: int, fresh: bool = False) -> Iterator[Journal]:
    """The journal of an export to `output`: the one that an equal run left, or a new one.

    identity: all that the result depends on, as JSON. fresh: forget what an earlier run left. It is removed when the
    block ends well, and where it ends before anything was finished. VlmqError where it is another run's, or where one
    is under way. All but the first worker come when the first has it.
    """
    output = Path(os.path.abspath(output))
    folder = folder_of(output)
    if workers.rank():
        yield Journal(folder, limit)
        return
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise VlmqError(f"{output}: another run is exporting to it; wait for it, or choose another --output") from None
    try:
        for left in _partial(output):  # of a run that was killed
            shutil.rmtree(left)
        if fresh:
            _remove(folder)
        with full_disk_in_words(output.parent):
            _claim(folder, dict(identity), output)
            journal = Journal(folder, limit)
            try:
                yield journal
            except BaseException:
                if not (folder / "state.json").exists():
                    _remove(folder)
                raise
        _remove(folder)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while held: who waits for it then sees that it is gone
        lock.release()


def left_behind(output: Path) -> int:
    """Bytes on the disk that an earlier run to `output` left, and that the next one takes over or removes."""
    output = Path(os.path.abspath(output))
    files = (file for folder in (folder_of(output), *_partial(output)) for file in folder.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def _partial(output: Path) -> list[Path]:
    return list(output.parent.glob(f".{glob.escape(output.name)}.partial-{'[0-9a-f]' * 8}"))


def _claim(folder: Path, identity: dict[str, Any], output: Path) -> None:
    found = _read(folder / "journal.json")
    if found is None:
        _remove(folder)  # what a run left that ended before it had said what it was
        folder.mkdir()
        sync(folder.parent)
        _write(folder / "journal.json", identity)
        return
    differing = sorted(key for key in identity.keys() | found.keys() if identity.get(key) != found.get(key))
    if differing:
        raise VlmqError(
            f"{folder}: the journal of a run with another {', '.join(differing)}; finish that one with its command, "
            f"pass --fresh to begin anew, or choose another --output than {output.name}"
        )


def write_block(found: QuantizedBlock, file: Path) -> None:
    """Everything of a block but its schemes, which the recipe says."""
    tensors: dict[str, Tensor] = {f"{name} changed": tensor for name, tensor in found.changed.items()}
    said = {}
    for name, site in found.sites.items():
        said[name] = {"loss": site.loss, "limits": site.limits and [site.limits.low, site.limits.high]}
        if site.fold is not None:
            tensors[f"{name} fold"] = site.fold.clone()  # the same for all that read an input
        match site.weight:
            case QuantizedWeight(codes, scale, zero):
                tensors |= {f"{name} codes": codes, f"{name} scale": scale, f"{name} zero": zero}
            case dense:
                tensors[f"{name} dense"] = dense
    part = file.with_suffix(".part")
    save(tensors, part, {"sites": json.dumps(said)})
    sync(part)
    part.rename(file)


def read_block(file: Path, block: Block, schemes: Schemes) -> QuantizedBlock:
    """What `write_block` wrote; `schemes` are those of its sites. VlmqError where the file is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            said = json.loads(opened.metadata()["sites"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise VlmqError(f"{file}: cannot be read ({error}); pass --fresh to begin anew") from error
    sites = {}
    for name, figures in said.items():
        dense = tensors.get(f"{name} dense")
        scheme = schemes[name]
        sites[name] = Solved(
            weight=QuantizedWeight(*(tensors[f"{name} {part}"] for part in ("codes", "scale", "zero")), scheme.grid)
            if dense is None
            else dense,
            scheme=scheme,
            fold=tensors.get(f"{name} fold"),
            loss=figures["loss"],
            limits=Limits(*figures["limits"]) if figures["limits"] else None,
        )
    changed = {name.removesuffix(" changed"): tensor for name, tensor in tensors.items() if name.endswith(" changed")}
    return QuantizedBlock(block, sites, changed)


def _read(file: Path) -> dict[str, Any] | None:
    """A file of the journal; None: there is none. VlmqError where it is damaged."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise VlmqError(f"{file}: cannot be read ({error}); pass --fresh to begin anew") from error


def _write(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, and on the disk."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content))
    sync(part)
    part.rename(file)
    sync(file.parent)


def _remove(folder: Path) -> None:
    """What tells what the journal holds goes first: a journal that is half removed is none."""
    (folder / "journal.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
