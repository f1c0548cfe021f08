"""Tiny models on a 4-bit grid and their ONNX folders, made once for all tests that look at them."""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tiny import tiny, tiny_folder
from torch import nn

from vlmq.formats.onnx_graphs import export
from vlmq.kernels.grid import Grid, QuantizedWeight, to_grid
from vlmq.kernels.linear import QuantizedLinear

KEPT = "lm_head"


@dataclass(frozen=True)
class Exported:
    folder: Path
    weights: dict[str, QuantizedWeight]
    packed: nn.Module  # linears on packed codes
    dense: nn.Module  # the same weights, dequantized into plain linears


def quantize(model: nn.Module, grid: Grid) -> dict[str, QuantizedWeight]:
    """Put every linear but the head on the grid, in place."""
    weights = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and KEPT not in name:
            weights[name] = to_grid(module.weight.data, grid)
            model.set_submodule(name, QuantizedLinear.from_weight(weights[name], module.bias))
    return weights


def half(variant: str) -> nn.Module:
    """The tiny model with weights that float16 holds, computing in float32."""
    return tiny(variant).half().float()


@functools.cache
def exported(variant: str) -> Exported:
    folder = _root() / variant
    tiny_folder(variant, folder)
    packed, dense = half(variant), half(variant)
    weights = quantize(packed, Grid(4, 32, symmetric=False))
    for name, weight in weights.items():
        dense.get_submodule(name).weight.data = weight.dequantize()
    export(packed, folder)
    return Exported(folder, weights, packed, dense)


@functools.cache
def _kept() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="vlmq-graphs-")


def _root() -> Path:
    return Path(_kept().name)
