"""Writing: quantized blocks, as they come, into the safetensors of an export.

Names are the source's on-disk names; what was neither quantized nor changed by a fold is copied byte for byte.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.solving import QuantizedBlock, Solved
from vlmq.exporter.walk import Block
from vlmq.formats import compressed_tensors, manifest
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.shards import MAX_SHARD_BYTES, SafetensorsWriter
from vlmq.kernels.grid import QuantizedWeight


@dataclass(frozen=True)
class Written:
    """What the manifest and config.json need to know of the weights."""

    records: dict[str, manifest.TensorRecord]  # by module name on disk
    grids: dict[str, Grids]  # of the packed linears, by name in memory


def write_weights(
    checkpoint: Checkpoint, blocks: Iterable[QuantizedBlock], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Written:
    """Write every tensor of the checkpoint, quantized or not, block by block; nothing is held longer than its block."""
    writer = SafetensorsWriter(folder, max_shard_bytes)
    left = dict(checkpoint.places)
    written = Written({}, {})
    for done in blocks:
        for name in [name for name in left if name.startswith(f"{done.block.name}.")]:
            place = left.pop(name)
            solved = done.sites.get(name.removesuffix(".weight"))
            if solved is None:
                writer.add({place.name: done.changed.get(name, checkpoint.read(name))})
                continue
            site = place.name.removesuffix(".weight")
            writer.add(_add(checkpoint, written, name.removesuffix(".weight"), site, solved, done.block))
        # A fold may reach a tensor that the block's prefix does not: none does today, and none may be lost.
        lost = set(done.changed) - set(checkpoint.places)
        assert not lost, lost
    for name, place in left.items():
        writer.add({place.name: checkpoint.read(name)})
    writer.close()
    return written


def _add(
    checkpoint: Checkpoint, written: Written, name: str, on_disk: str, solved: Solved, block: Block
) -> dict[str, Tensor]:
    """Note what became of a site, and return its tensors."""
    fold = _fold_in_words(checkpoint, name, solved, block)
    inputs, limits = solved.scheme.inputs, solved.limits
    if isinstance(solved.weight, QuantizedWeight):
        written.grids[name] = Grids(solved.weight.grid, inputs, limits)
        written.records[on_disk] = manifest.record(solved.weight, solved.scheme.method, fold, inputs, limits)
        return compressed_tensors.pack(on_disk, solved.weight, inputs, limits)
    assert inputs is None, f"{name}: a linear that is stored dense has no config group to round its input"
    grid, rows = solved.scheme.grid, solved.scheme.rows
    written.records[on_disk] = manifest.record_dense(solved.weight, grid, solved.scheme.method, rows, fold)
    return {f"{on_disk}.weight": solved.weight}


def _fold_in_words(checkpoint: Checkpoint, name: str, solved: Solved, block: Block) -> str | None:
    """Which module, by its name on disk, took the inverse of the scale, and which of its rows."""
    if solved.fold is None:
        return None
    source = next(entry.source for entry in block.inputs if any(site.name == name for site in entry.sites))
    assert source is not None
    rows = f" rows {source.rows.start}:{source.rows.stop}" if source.rows else ""
    return checkpoint.places[f"{source.name}.weight"].name.removesuffix(".weight") + rows
