"""The quantized weights in a written graph, as they were solved: to compare with those of another format."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from vlmq.formats.errors import FormatError
from vlmq.formats.onnx_graphs import GRIDS
from vlmq.kernels import nbits
from vlmq.kernels.grid import Grid, QuantizedWeight
from vlmq.kernels.nbits import NBitsWeight


def read_weights(path: Path) -> dict[str, QuantizedWeight]:
    """{name of the module in the model: its weight, codes, scale and zero bit for bit} of one graph file."""
    model = load(path)
    return {name: read_weight(model, name, grid) for name, grid in recorded_grids(path, model).items()}


def load(path: Path) -> ir.Model:
    """A graph, its tensors mapped; FormatError where it is none."""
    try:
        return ir.load(path)
    except Exception as error:  # protobuf has its own, and they change
        raise FormatError(f"{path}: not a whole graph ({type(error).__name__}); copy the folder again") from None


def values_of(name: str, tensor: ir.TensorProtocol) -> torch.Tensor:
    """A copy of a stored tensor; FormatError where its file is cut short."""
    try:
        return torch.from_numpy(np.array(tensor.numpy()))
    except (OSError, ValueError) as error:
        raise FormatError(f"{name}: its values cannot be read ({error}); copy the folder again") from None


def recorded_grids(path: Path, model: ir.Model) -> dict[str, list]:
    """What the metadata of a loaded graph say of each quantized linear, for `read_weight`."""
    if GRIDS not in model.metadata_props:
        raise FormatError(f"{path}: no {GRIDS} in its metadata; read a graph that vlmq wrote")
    return json.loads(model.metadata_props[GRIDS])


def read_weight(model: ir.Model, name: str, recorded: list) -> QuantizedWeight:
    """One weight of a loaded graph; FormatError where it lacks codes or scales."""
    bits, group, symmetric, columns, dtype = recorded

    def tensor(part: str) -> torch.Tensor | None:
        value = model.graph.initializers.get(f"{name}.{part}")
        stored = None if value is None else value.const_value
        return None if stored is None else values_of(f"{name}.{part}", stored)

    qweight, scales = tensor("qweight"), tensor("scales")
    if qweight is None or scales is None:
        raise FormatError(f"{name}: its graph has no qweight or scales of it; export again")
    scales = scales.to(getattr(torch, dtype.removeprefix("torch.")))  # exact: finish() only widens or checks
    grid = Grid(bits, group, symmetric)
    return nbits.unpack(NBitsWeight(qweight, scales, tensor("qzeros"), columns, grid))
