"""AWQ: Activation-aware Weight Quantization (Lin et al., arXiv 2306.00978; on BLIP-2, paper 000).

Section 3.2: channels whose inputs are large are scaled up before rounding and down again in what makes the input,
`s = mean|x|^a`, with the exponent that minimises the output error

    || Q(W diag(s)) diag(1/s) X - W X ||^2 = tr(D H D^T),   D = Q(W diag(s)) diag(1/s) - W,   H = X X^T

All linears that read an input share one `s`. Then each group's range is shrunk (clipped) where that lowers the
error its columns cause. From H alone, the cost does not grow with the number of calibration tokens.
"""

import math

import torch
from torch import Tensor

from vlmq.exporter.methods.problem import Problem
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.statistics import Statistics, output_loss, row_losses
from vlmq.kernels.grid import ROWS, TENSOR, Grid, QuantizedWeight, between, extremes, nearest, round_trip, to_grid

EXPONENTS = tuple(step / 20 for step in range(20))  # a = 0 is "no scaling"
LIKELY = 0.4  # the exponent that is tried first: the sooner a good one is known, the sooner the others are left
SHRINKS = tuple(1 - step / 20 for step in range(11))  # 1.0 ... 0.5 of the range
SLAB = 512  # rows in one product with a Gram matrix: enough to be fast, few enough to bound the search's memory


def rescale(problem: Problem) -> Tensor:
    """The scale s (in,) for an input, float32, all ones where no scaling is best.

    By the error of the linears that read it, from the Gram matrix; with `awq_loss: block` by that of the whole block,
    which is run once for every candidate.
    """
    candidates = [candidate(problem.statistics, exponent) for exponent in EXPONENTS]
    if any(scheme.options.awq_loss == "block" for scheme in problem.schemes):
        return min(candidates, key=problem.trial)
    losses = [math.inf] * len(candidates)
    for index in sorted(range(len(candidates)), key=lambda index: abs(EXPONENTS[index] - LIKELY)):
        losses[index] = scale_loss(problem, candidates[index], min(losses))
    return candidates[losses.index(min(losses))]


def candidate(statistics: Statistics, exponent: float) -> Tensor:
    """mean|x|^a, normalised so that its extremes are each other's inverse (in,)."""
    scale = statistics.mean_absolute.clamp(min=1e-5).pow(exponent)
    return scale / (scale.max() * scale.min()).sqrt()


def scale_loss(problem: Problem, scale: Tensor, limit: float = math.inf) -> float:
    """tr(D H D^T), summed over the weights that read the input, for one scale (in,).

    No row's share is negative, so the rows that are left are not looked at once the sum is above the limit.
    """
    total = 0.0
    for weight, scheme in zip(problem.weights, problem.schemes, strict=True):
        for rows in (weight,) if scheme.grid.group == TENSOR else weight.split(SLAB):
            error = round_trip(rows * scale, scheme.grid, problem.dtype).div_(scale).sub_(rows)
            total += output_loss(error, problem.statistics.gram).item()
            if total > limit:
                return total
    return total


def solve(weight: Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """Round to nearest with each group's range shrunk by the factor that minimises the error its columns cause."""
    return to_grid(weight, scheme.grid, dtype, clip(weight, statistics, scheme.grid, dtype))


def clip(weight: Tensor, statistics: Statistics, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The factor of SHRINKS for each group: weight (out, in)  ->  (out, groups); one for all of a TENSOR grid."""
    grams = _diagonal_blocks(statistics.gram, grid.width(weight.shape[1]))
    low, high = extremes(weight, grid)
    parts = zip(weight.split(ROWS), low.split(ROWS), high.split(ROWS), strict=True)
    losses = [_losses(*part, grams, grid, dtype) for part in parts]
    if grid.group == TENSOR:  # one scale, so one factor: all rows count together
        total = torch.stack([found.sum((1, 2)) for found in losses]).sum(0)
        return torch.full((len(weight), 1), SHRINKS[int(total.argmin())], device=weight.device)
    return torch.cat([_best(found) for found in losses])


def _diagonal_blocks(gram: Tensor, width: int) -> Tensor:
    """The Gram matrix of each group's own columns: (in, in)  ->  (groups, width, width)."""
    blocks = gram.unflatten(1, (-1, width)).unflatten(0, (-1, width))  # (groups, width, groups, width)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _losses(weight: Tensor, low: Tensor, high: Tensor, grams: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The error that each group's own columns cause for each factor of SHRINKS (shrinks, out, groups).

    weight (out, in), low and high (out, groups), its groups' extremes.
    """
    losses = []
    for shrink in SHRINKS:
        error = nearest(weight, *between(low * shrink, high * shrink, grid, dtype), grid).sub_(weight)
        by_group = error.unflatten(1, (len(grams), -1)).transpose(0, 1)  # (groups, out, width)
        losses.append(row_losses(by_group, grams).T)
    return torch.stack(losses)


def _best(losses: Tensor) -> Tensor:
    """(shrinks, out, groups)  ->  the factor of least error (out, groups); of equals the first."""
    least, factor = losses[0], torch.ones_like(losses[0])
    for shrink, loss in zip(SHRINKS[1:], losses[1:], strict=True):
        better = loss < least
        least = torch.where(better, loss, least)
        factor = torch.where(better, shrink, factor)
    return factor
