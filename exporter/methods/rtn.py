"""Round to nearest: every weight takes the nearest level of its group's grid. Needs no calibration."""

import torch
from torch import Tensor

from vlmq.exporter.statistics import Statistics
from vlmq.kernels.grid import Grid, QuantizedWeight, to_grid


def solve(weight: Tensor, statistics: Statistics, grid: Grid, dtype: torch.dtype) -> QuantizedWeight:
    """weight (out, in) float32 -> its nearest point on the grid, scales stored in `dtype`."""
    return to_grid(weight, grid, dtype)
