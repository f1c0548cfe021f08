"""The quantizers by name. A method says how an input is rescaled (None: not at all) and how codes are chosen."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq.exporter.methods import awq, rtn
from vlmq.exporter.statistics import Statistics
from vlmq.kernels.grid import Grid, QuantizedWeight

Rescale = Callable[[list[Tensor], Statistics, list[Grid], torch.dtype], Tensor]
Solve = Callable[[Tensor, Statistics, Grid, torch.dtype], QuantizedWeight]


@dataclass(frozen=True)
class Method:
    """`rescale` picks a scale to fold before an input; `solve` turns a weight into codes.

    calibrated: whether `solve` looks at the statistics.
    """

    solve: Solve
    rescale: Rescale | None = None
    calibrated: bool = True


METHODS: dict[str, Method] = {
    "rtn": Method(rtn.solve, calibrated=False),
    "awq": Method(awq.solve, awq.rescale),
}
