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
    model = ir.load(path)
    if GRIDS not in model.metadata_props:
        raise FormatError(f"{path}: no {GRIDS} in its metadata; read a graph that vlmq wrote")
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}

    def tensor(name: str) -> torch.Tensor | None:
        stored = tensors.get(name)
        return None if stored is None else torch.from_numpy(np.array(stored.numpy()))  # a copy: the file is mapped

    weights = {}
    for name, (bits, group, symmetric, columns, dtype) in json.loads(model.metadata_props[GRIDS]).items():
        qweight, scales = tensor(f"{name}.qweight"), tensor(f"{name}.scales")
        if qweight is None or scales is None:
            raise FormatError(f"{path}: {name} has no qweight or scales; export again")
        scales = scales.to(getattr(torch, dtype.removeprefix("torch.")))  # exact: finish() only widens or checks
        grid = Grid(bits, group, symmetric)
        weights[name] = nbits.unpack(NBitsWeight(qweight, scales, tensor(f"{name}.qzeros"), columns, grid))
    return weights
