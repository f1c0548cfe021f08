"""AWQ: Activation-aware Weight Quantization (Lin et al., arXiv 2306.00978; on BLIP-2, paper 000).

Section 3.2: channels whose inputs are large are scaled up before rounding and down again in what makes the input,
`s = mean|x|^a`, with the exponent that minimises the output error

    || Q(W diag(s)) diag(1/s) X - W X ||^2 = tr(D H D^T),   D = Q(W diag(s)) diag(1/s) - W,   H = X X^T

All linears that read an input share one `s`. Then each group's range is shrunk (clipped) where that lowers the
error its columns cause. From H alone, the cost does not grow with the number of calibration tokens.
"""

from functools import partial

import torch
from torch import Tensor

from vlmq.exporter.methods.problem import Problem
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.statistics import Statistics, output_loss
from vlmq.kernels.grid import TENSOR, Grid, QuantizedWeight, round_trip, to_grid

EXPONENTS = tuple(step / 20 for step in range(20))  # a = 0 is "no scaling"
SHRINKS = tuple(1 - step / 20 for step in range(11))  # 1.0 ... 0.5 of the range
ROWS = 1024  # rows searched at once: bounds the clip search's memory, but for a grid that all rows share


def rescale(problem: Problem) -> Tensor:
    """The scale s (in,) for an input, float32, all ones where no scaling is best.

    By the error of the linears that read it, from the Gram matrix; with `awq_loss: block` by that of the whole block,
    which is run once for every candidate.
    """
    by_block = any(scheme.options.awq_loss == "block" for scheme in problem.schemes)
    loss = problem.trial if by_block else partial(scale_loss, problem)
    return min((candidate(problem.statistics, exponent) for exponent in EXPONENTS), key=loss)


def candidate(statistics: Statistics, exponent: float) -> Tensor:
    """mean|x|^a, normalised so that its extremes are each other's inverse (in,)."""
    scale = statistics.mean_absolute.clamp(min=1e-5).pow(exponent)
    return scale / (scale.max() * scale.min()).sqrt()


def scale_loss(problem: Problem, scale: Tensor) -> float:
    """tr(D H D^T), summed over the weights that read the input, for one scale (in,)."""
    total = 0.0
    for weight, scheme in zip(problem.weights, problem.schemes, strict=True):
        error = round_trip(weight * scale, scheme.grid, problem.dtype) / scale - weight
        total += output_loss(error, problem.statistics.gram).item()
    return total


def solve(weight: Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """Round to nearest with each group's range shrunk by the factor that minimises the error its columns cause."""
    return to_grid(weight, scheme.grid, dtype, clip(weight, statistics, scheme.grid, dtype))


def clip(weight: Tensor, statistics: Statistics, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The factor of SHRINKS for each group: weight (out, in)  ->  (out, groups); one for all of a TENSOR grid."""
    grams = _diagonal_blocks(statistics.gram, grid.width(weight.shape[1]))
    if grid.group == TENSOR:  # one scale, so one factor: all rows count together
        losses = torch.stack([_group_losses(weight, grams, grid, dtype, shrink).sum() for shrink in SHRINKS])
        return torch.full((len(weight), 1), SHRINKS[int(losses.argmin())], device=weight.device)
    return torch.cat([_clip_rows(rows, grams, grid, dtype) for rows in weight.split(ROWS)])


def _diagonal_blocks(gram: Tensor, width: int) -> Tensor:
    """The Gram matrix of each group's own columns: (in, in)  ->  (groups, width, width)."""
    blocks = gram.unflatten(1, (-1, width)).unflatten(0, (-1, width))  # (groups, width, groups, width)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _clip_rows(weight: Tensor, grams: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    best_loss = torch.full((len(weight), len(grams)), torch.inf, device=weight.device)
    best = torch.ones_like(best_loss)
    for shrink in SHRINKS:
        loss = _group_losses(weight, grams, grid, dtype, shrink)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best = torch.where(better, shrink, best)
    return best


def _group_losses(weight: Tensor, grams: Tensor, grid: Grid, dtype: torch.dtype, shrink: float) -> Tensor:
    """The error that each group's own columns cause when its range is shrunk (out, groups)."""
    error = (round_trip(weight, grid, dtype, shrink) - weight).unflatten(1, (len(grams), -1))  # (out, groups, width)
    return (torch.einsum("ogi,gij->ogj", error, grams) * error).sum(-1)
