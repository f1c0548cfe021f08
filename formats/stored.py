"""What the files of an exported folder hold, tensor by tensor: its safetensors, and its ONNX graphs.

Both answer the same two questions, so that one check can be put to either. Nothing is held longer than it is looked
at: safetensors and the graphs' data files are mapped.
"""

from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Protocol

import onnx_ir as ir
import torch
from safetensors import safe_open
from torch import Tensor

from vlmq.formats import layouts
from vlmq.formats.errors import FormatError
from vlmq.formats.manifest import DENSE, TensorRecord, digest_of
from vlmq.formats.onnx_weights import load, read_weight, recorded_grids, recorded_inputs, values_of
from vlmq.formats.shards import headers
from vlmq.kernels.grid import QuantizedWeight


class Stored(Protocol):
    """The tensors of one format of an export; a name is given as the model has it, and as the source's files do."""

    format: str

    def weight(self, memory: str, disk: str, record: TensorRecord) -> QuantizedWeight | Tensor | None:
        """The weight of a quantized linear; a dense one (out, in) where it is stored so; None where there is none."""

    def tensor(self, memory: str, disk: str, like: Tensor) -> Tensor | None:
        """A tensor that was not quantized, in the shape of `like`; None where there is none of its name."""

    def names(self) -> set[str]:
        """All modules that have a packed weight: by their names on disk, or in memory, as the format names them."""


class Safetensors:
    """The safetensors of a folder, in any layout of `layouts.py`."""

    format = "safetensors"

    def __init__(self, folder: Path) -> None:
        self.headers = headers(folder)
        self.files = {name: safe_open(folder / name, "pt") for name in {h.file for h in self.headers.values()}}

    def _get(self, name: str) -> Tensor:
        return self.files[self.headers[name].file].get_tensor(name)

    def weight(self, memory: str, disk: str, record: TensorRecord) -> QuantizedWeight | Tensor | None:
        if record.stored == DENSE:
            return self._get(f"{disk}.weight") if f"{disk}.weight" in self.headers else None
        layout = layouts.STORED[record.stored]
        parts = {f"{disk}.{part}": self._get(f"{disk}.{part}") for part in layout.parts if self._has(disk, part)}
        return layout.unpack(disk, parts, record.grids.weight) if parts else None

    def _has(self, disk: str, part: str) -> bool:
        return f"{disk}.{part}" in self.headers

    def tensor(self, memory: str, disk: str, like: Tensor) -> Tensor | None:
        return self._get(disk) if disk in self.headers else None

    def names(self) -> set[str]:
        split = (name.rpartition(".") for name in self.headers)
        return {module for module, _, part in split if part in layouts.PARTS}


class Graphs:
    """The graphs of a folder, whose initializers are called as in the model.

    A matrix that the tracer transposed has no name; it is known by what it holds.
    """

    format = "onnx"

    def __init__(self, folder: Path, aliases: Mapping[str, str]) -> None:
        """aliases: other names of tied tensors, in memory."""
        self.aliases = aliases
        self.packed: dict[str, tuple[ir.Model, list]] = {}
        self.inputs: dict[str, list] = {}
        self.values: dict[str, ir.Value] = {}
        self.unnamed: dict[tuple[int, ...], list[ir.Value]] = {}
        for path in sorted((folder / "onnx").glob("*.onnx")):
            model = load(path)
            self.packed |= {name: (model, grid) for name, grid in recorded_grids(path, model).items()}
            self.inputs |= recorded_inputs(model)
            for name, value in model.graph.initializers.items():
                if value.const_value is None:
                    continue
                self.values[name] = value
                if "." not in name and len(value.const_value.shape) == 2:
                    self.unnamed.setdefault(tuple(value.const_value.shape.numpy()), []).append(value)

    def weight(self, memory: str, disk: str, record: TensorRecord) -> QuantizedWeight | Tensor | None:
        if record.stored == DENSE:
            return self._dense(memory, record)
        if memory not in self.packed:
            return self._table(memory, record)
        limits = record.limits or (None, None)
        if self.inputs.get(memory) != (record.inputs and [*astuple(record.inputs), *limits]):
            raise FormatError(f"{memory}: its graph rounds inputs as the manifest does not say; export again")
        model, grid = self.packed[memory]
        return read_weight(model, memory, grid)

    def _table(self, memory: str, record: TensorRecord) -> Tensor | None:
        """A packed token embedding that its graph looks up in a dense table, which holds the same values."""
        name = f"{memory}.weight"
        value = self.values.get(name) or self.values.get(self.aliases.get(name, ""))
        tensor = None if value is None else _tensor(value)
        return tensor if tensor is not None and digest_of(tensor) == record.sha256 else None

    def _dense(self, memory: str, record: TensorRecord) -> Tensor | None:
        if f"{memory}.weight" in self.values:
            return _tensor(self.values[f"{memory}.weight"])
        rows, columns = record.shape
        turned = [_tensor(value).T for value in self.unnamed.get((columns, rows), ())]
        return next((tensor for tensor in turned if digest_of(tensor) == record.sha256), turned[0] if turned else None)

    def tensor(self, memory: str, disk: str, like: Tensor) -> Tensor | None:
        value = self.values.get(memory) or self.values.get(self.aliases.get(memory, ""))
        if value is not None:
            return _tensor(value).reshape(like.shape)
        turned = [_tensor(value).T for value in self.unnamed.get(tuple(reversed(like.shape)), ())]
        same = [tensor for tensor in turned if torch.equal(tensor.float(), like.float())]
        return same[0] if same else None

    def names(self) -> set[str]:
        return set(self.packed)


def _tensor(value: ir.Value) -> Tensor:
    assert value.const_value is not None
    return values_of(value.name or "", value.const_value)


def sizes_of(stored: Stored) -> dict[str, int]:
    """Bytes of every tensor, by its name on disk (safetensors) or in the graphs."""
    if isinstance(stored, Safetensors):
        return {name: header.bytes for name, header in stored.headers.items()}
    assert isinstance(stored, Graphs)
    known = {name: value.const_value for name, value in stored.values.items()}
    return {name: tensor.nbytes for name, tensor in known.items() if tensor is not None}
