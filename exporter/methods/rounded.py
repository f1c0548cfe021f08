"""The error of linears whose weights and input are both rounded: no sum over tokens holds it, so rows are needed.

sum_t w_t || Q(W diag(s)) Q(x_t / s) - W x_t ||^2
"""

from collections.abc import Iterable

from torch import Tensor

from vlmq.exporter.methods.problem import Problem
from vlmq.exporter.statistics import Statistics
from vlmq.kernels.grid import TENSOR, Grid, Limits, round_input, round_trip


def best(problem: Problem, candidates: Iterable[Tensor]) -> Tensor:
    """The scale s (in,) with the least error on the kept rows; of equals the first."""
    targets = [problem.statistics.rows @ weight.T for weight in problem.weights]
    return min(candidates, key=lambda scale: rounded_loss(problem, scale, targets))


def rounded_loss(problem: Problem, scale: Tensor, targets: Iterable[Tensor]) -> float:
    """The error on the kept rows, summed over the weights that read the input, for one scale (in,).

    targets: what each weight makes of the rows, (k, out).
    """
    scaled = problem.statistics.divided_by(scale)
    rounded: dict[Grid | None, Tensor] = {None: scaled.rows}
    total = 0.0
    for weight, scheme, target in zip(problem.weights, problem.schemes, targets, strict=True):
        grid = scheme.inputs
        if grid is not None and grid not in rounded:
            rounded[grid] = round_input(scaled.rows, grid, limits_of(scaled, grid))
        error = rounded[grid] @ round_trip(weight * scale, scheme.grid, problem.dtype).T - target
        total += (error.square().sum(1) * scaled.row_weights).sum().item()
    return total


def limits_of(statistics: Statistics, grid: Grid) -> Limits | None:
    """The range of an input that has one for all its tokens: its extremes in calibration; else None."""
    if grid.group != TENSOR:
        return None
    return Limits(statistics.low.min().item(), statistics.high.max().item())
