"""AWQ: Activation-aware Weight Quantization (Lin et al., arXiv 2306.00978; on BLIP-2, paper 000).

Section 3.2: channels whose inputs are large are scaled up before rounding and down again in what makes the input,
`s = mean|x|^a`, with the exponent that minimises the output error

    || Q(W diag(s)) diag(1/s) X - W X ||^2 = tr(D H D^T),   D = Q(W diag(s)) diag(1/s) - W,   H = X X^T

All linears that read an input share one `s`. Then each group's range is shrunk (clipped) where that lowers the
error its columns cause. At 2 and 3 bits clipping decides which exponent is best, so there Q clips while exponents are
compared: the paper's search, which does not, leaves up to twice the error. From H alone, the cost does not grow with
the number of calibration tokens; and the exponents race (`racing.py`), so that most are left after a few rows of the
weights.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlmq.exporter.methods.problem import Problem
from vlmq.exporter.methods.racing import race
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.statistics import Statistics, row_losses
from vlmq.kernels.grid import TENSOR, Grid, QuantizedWeight, at_once, between, extremes, nearest, round_trip, to_grid

EXPONENTS = tuple(step / 20 for step in range(20))  # a = 0 is "no scaling"
SHRINKS = tuple(1 - step / 20 for step in range(11))  # 1.0 ... 0.5 of the range
FEW = SHRINKS[::2]  # that are tried while exponents are compared
NARROW = 3  # bits up to which they are: beyond, clipping gains about as much with any exponent
SLAB = 128  # rows after which candidates may be left: enough for a product with a Gram matrix to be fast


def rescale(problem: Problem) -> Tensor:
    """The scale s (in,) for an input, float32, all ones where no scaling is best.

    By the error of the linears that read it, from the Gram matrix; with `awq_loss: block` by that of the whole block,
    which is run once for every candidate.
    """
    candidates = [candidate(problem.statistics, exponent) for exponent in EXPONENTS]
    if any(scheme.options.awq_loss == "block" for scheme in problem.schemes):
        return min(candidates, key=problem.trial)
    slabs = _slabs(problem)

    def losses(index: int, slab: int) -> Tensor:
        return scale_losses(slabs[slab], candidates[index], problem.statistics.gram, problem.dtype)

    return candidates[race(len(candidates), len(slabs), sum(map(len, problem.weights)), losses)]


def _slabs(problem: Problem) -> list[list[tuple[Tensor, Scheme]]]:
    """The rows of all weights in slabs, of which each holds some of every weight, evenly drawn.

    A TENSOR grid spans all rows of its weight: then they are one slab.
    """
    pairs = list(zip(problem.weights, problem.schemes, strict=True))
    whole = any(scheme.grid.group == TENSOR for scheme in problem.schemes)
    slabs = 1 if whole else math.ceil(sum(map(len, problem.weights)) / SLAB)
    return [[(weight[slab::slabs], scheme) for weight, scheme in pairs] for slab in range(slabs)]


def candidate(statistics: Statistics, exponent: float) -> Tensor:
    """mean|x|^a, normalised so that its extremes are each other's inverse (in,)."""
    scale = statistics.mean_absolute.clamp(min=1e-5).pow(exponent)
    return scale / (scale.max() * scale.min()).sqrt()


def scale_losses(slab: list[tuple[Tensor, Scheme]], scale: Tensor, gram: Tensor, dtype: torch.dtype) -> Tensor:
    """What each row adds to tr(D H D^T) for one scale (in,): (rows,), weight after weight of the slab's (rows, in)."""
    losses = []
    for weight, scheme in slab:
        grid, options = scheme.grid, scheme.options
        scaled, factors = weight * scale, torch.ones(())
        if grid.bits <= NARROW and options.clip and options.static_groups:
            own = scale.view(-1, grid.width(len(scale)))  # of each group's columns
            grams = _diagonal_blocks(gram, own.shape[1]) / (own.unsqueeze(2) * own.unsqueeze(1))
            factors = _factors(scaled, grams, grid, dtype, FEW)
        error = round_trip(scaled, grid, dtype, factors).div_(scale).sub_(weight)
        losses.append(row_losses(error, gram))
    return torch.cat(losses)


def solve(weight: Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """Round to nearest with each group's range shrunk by the factor that minimises the error its columns cause."""
    return to_grid(weight, scheme.grid, dtype, clip(weight, statistics, scheme.grid, dtype))


def clip(weight: Tensor, statistics: Statistics, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The factor of SHRINKS for each group: weight (out, in)  ->  (out, groups); one for all of a TENSOR grid."""
    return _factors(weight, _diagonal_blocks(statistics.gram, grid.width(weight.shape[1])), grid, dtype, SHRINKS)


def _factors(weight: Tensor, grams: Tensor, grid: Grid, dtype: torch.dtype, shrinks: Sequence[float]) -> Tensor:
    """The same, of some factors. grams: of each group's own columns (groups, width, width)."""
    low, high = extremes(weight, grid)
    rows = at_once(weight)
    parts = zip(weight.split(rows), low.split(rows), high.split(rows), strict=True)
    losses = [_losses(*part, grams, grid, dtype, shrinks) for part in parts]
    if grid.group == TENSOR:  # one scale, so one factor: all rows count together
        total = torch.stack([found.sum((1, 2)) for found in losses]).sum(0)
        return torch.full((len(weight), 1), shrinks[int(total.argmin())], device=weight.device)
    return torch.cat([_best(found, shrinks) for found in losses])


def _diagonal_blocks(gram: Tensor, width: int) -> Tensor:
    """The Gram matrix of each group's own columns: (in, in)  ->  (groups, width, width)."""
    blocks = gram.unflatten(1, (-1, width)).unflatten(0, (-1, width))  # (groups, width, groups, width)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _losses(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    grams: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    shrinks: Sequence[float],
) -> Tensor:
    """The error that each group's own columns cause for each factor of `shrinks` (shrinks, out, groups).

    weight (out, in), low and high (out, groups), its groups' extremes.
    """
    losses = []
    for shrink in shrinks:
        error = nearest(weight, *between(low * shrink, high * shrink, grid, dtype), grid).sub_(weight)
        by_group = error.unflatten(1, (len(grams), -1)).transpose(0, 1)  # (groups, out, width)
        losses.append(row_losses(by_group, grams).T)
    return torch.stack(losses)


def _best(losses: Tensor, shrinks: Sequence[float]) -> Tensor:
    """(shrinks, out, groups)  ->  the factor of least error (out, groups); of equals the first."""
    least, factor = losses[0], torch.ones_like(losses[0])
    for shrink, loss in zip(shrinks[1:], losses[1:], strict=True):
        better = loss < least
        least = torch.where(better, loss, least)
        factor = torch.where(better, shrink, factor)
    return factor
