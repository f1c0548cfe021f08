"""The error of a linear whose weight and input are both rounded: no sum over tokens holds it, so rows are needed.

sum_t w_t || Q(W diag(s)) Q(x_t / s) - W x_t ||^2
"""

from torch import Tensor

from vlmq.exporter.methods.problem import Problem
from vlmq.exporter.statistics import Statistics
from vlmq.kernels.grid import TENSOR, Grid, Limits, round_input, round_trip


def rounded_loss(problem: Problem, scale: Tensor) -> float:
    """The error on the kept rows, summed over the weights that read the input, for one scale (in,)."""
    total = 0.0
    rows = problem.statistics.rows
    scaled = problem.statistics.divided_by(scale)
    for weight, scheme in zip(problem.weights, problem.schemes, strict=True):
        assert scheme.inputs is not None  # the recipe refuses these methods without an activation grid
        inputs = round_input(scaled.rows, scheme.inputs, limits_of(scaled, scheme.inputs))
        error = inputs @ round_trip(weight * scale, scheme.grid, problem.dtype).T - rows @ weight.T
        total += (error.square().sum(1) * scaled.row_weights).sum().item()
    return total


def limits_of(statistics: Statistics, grid: Grid) -> Limits | None:
    """The range of an input that has one for all its tokens: its extremes in calibration; else None."""
    if grid.group != TENSOR:
        return None
    return Limits(statistics.low.min().item(), statistics.high.max().item())
