"""How far a quantized weight lies from what it stands for, in steps of its grid.

A step is the scale that rounding to nearest would give the group, so that the unit does not depend on what is judged.
Nearest rounding is off by 1/sqrt(12) = 0.29 steps in the mean square; methods that trade a weight's error for its
output's (GPTQ) or shrink ranges (AWQ) by a few times that. A zero or an order that is wrong is off by more than one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq.kernels.grid import Grid, fit

TINY = 1e-30
HALF = 1e-2  # relative error of a row in 16 bits that counts as a step: a fold rounds both of its sides


@dataclass(frozen=True)
class Distance:
    """In steps but for `error`, which is relative to the size of the weight."""

    steps: float  # root mean square over the weight
    worst: float  # and over the group that is farthest off
    shift: float  # mean over the group that is shifted most
    columns: float  # how much the columns' scales differ from those expected, against what rounding explains
    error: float


def distance(
    found: Tensor,
    wanted: Tensor,
    grid: Grid,
    parts: Sequence[slice] | None = None,
    unsure: Tensor | None = None,
) -> Distance:
    """found, wanted (out, in) float32; parts: the rows that lie on the grid, the others are in 16 bits.

    unsure (in,): the relative standard error that the columns of `wanted` have; what it explains counts for nothing.
    """
    unsure = torch.zeros(wanted.shape[1]) if unsure is None else unsure.float().expand(wanted.shape[1])
    on_grid = torch.zeros(len(wanted), dtype=torch.bool)
    for part in parts or [slice(None)]:
        on_grid[part] = True
    scale, _ = fit(wanted[on_grid], grid, torch.float32)
    difference = found - wanted
    off = difference[on_grid].unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(-1)  # (rows, groups, columns)
    explained = (wanted[on_grid] * unsure).unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(-1)
    squares = (off.square().mean(-1) - explained.square().mean(-1)).clamp(min=0)
    error = (difference.norm() / wanted.norm().clamp(min=TINY)).item()
    worst = squares.max().sqrt().item()
    if not bool(on_grid.all()):
        kept = difference[~on_grid].norm(dim=1) / wanted[~on_grid].norm(dim=1).clamp(min=TINY)
        worst = max(worst, (kept.max() / HALF).item())
    shift = off.mean(-1).abs().max().item()
    return Distance(squares.mean().sqrt().item(), worst, shift, _columns(found, wanted, unsure), error)


def _columns(found: Tensor, wanted: Tensor, unsure: Tensor) -> float:
    """Root mean square, over columns, of the factor by which one is too large, in standard errors of that factor.

    About 1 where the errors in a column have nothing to do with one another; far more where a scale was folded on one
    side alone, though its steps may be smaller than those of the grid. A factor that all columns share is left out:
    coarse grids shrink weights.
    """
    size = wanted.square().sum(0)
    known = size > TINY
    products = ((found - wanted) * wanted)[:, known]
    size = size[known]
    factors = products.sum(0) / size
    deviation = torch.hypot(products.square().sum(0).sqrt() / size, unsure[known])
    scores = (factors - factors.median()) / deviation.clamp(min=TINY)
    return scores.square().mean().sqrt().item()
