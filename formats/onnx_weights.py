"""The quantized weights in a written graph, as they were solved: to compare with those of another format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from vlmq.formats.errors import FormatError
from vlmq.formats.onnx_graphs import GRIDS, INPUTS
from vlmq.kernels import products
from vlmq.kernels.grid import Grid, QuantizedWeight


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


def recorded_inputs(model: ir.Model) -> dict[str, list]:
    """What the metadata of a loaded graph say of each linear that rounds its input: the grid, then the limits."""
    return json.loads(model.metadata_props.get(INPUTS, "{}"))


def summary(folder: Path) -> list[dict[str, Any]]:
    """What the linears in the graphs of a folder are, for the manifest: an entry for each scheme and product.

    bytes: of their tensors, scales and zeros included. simulated: inputs are rounded in floating point beforehand.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for path in sorted((folder / "onnx").glob("*.onnx")):
        model = load(path)
        inputs = recorded_inputs(model)
        for name, (bits, group, symmetric, _, _, kind) in recorded_grids(path, model).items():
            if name in seen:  # two graphs look tokens up in one table
                continue
            seen.add(name)
            rounded = dict(zip(("bits", "group", "symmetric"), inputs[name], strict=False)) if name in inputs else None
            entry = {
                "weight": {"bits": bits, "group": group, "symmetric": symmetric},
                "inputs": rounded,
                "product": kind,
                "simulated": rounded is not None and kind != products.INTEGERS,
            }
            counted = found.setdefault(json.dumps(entry, sort_keys=True), {**entry, "linears": 0, "bytes": 0})
            counted["linears"] += 1
            counted["bytes"] += sum(tensor.nbytes for tensor in _stored(model, name).values())
    return [found[key] for key in sorted(found)]


def _stored(model: ir.Model, name: str) -> dict[str, ir.TensorProtocol]:
    """The tensors of one linear, by part."""
    values = {part: model.graph.initializers.get(f"{name}.{part}") for part in products.PARTS}
    return {part: value.const_value for part, value in values.items() if value is not None and value.const_value}


def read_weight(model: ir.Model, name: str, recorded: list) -> QuantizedWeight:
    """One weight of a loaded graph; FormatError where it lacks a tensor of it."""
    bits, group, symmetric, columns, dtype, *kind = recorded
    grid = Grid(bits, group, symmetric)
    tensors = {part: values_of(f"{name}.{part}", stored) for part, stored in _stored(model, name).items()}
    try:
        # exact: finish() only widens or checks
        tensors["scales"] = tensors["scales"].to(getattr(torch, dtype.removeprefix("torch.")))
        return products.unpack(tensors, kind[0] if kind else products.unsaid(grid), columns, grid)
    except KeyError as error:
        raise FormatError(f"{name}: its graph has no {error.args[0]} of it; export again") from None
