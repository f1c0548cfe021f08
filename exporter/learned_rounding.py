"""A linear whose rounding has parameters to learn: how far the range of its input, and of its weight, is drawn in.

Rounding has no gradient; the straight-through estimator (Bengio et al. 2013) takes that of the value before it, so
that ranges learn from what lies beyond them as well as from what is rounded within (Esser et al. 2020, arXiv
1902.08153). The values are those of `kernels/grid.py`, bit for bit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmq.exporter.scheme import Scheme
from vlmq.kernels.grid import TENSOR, Grid, Limits, between, round_input

NARROWEST, WIDEST = 0.1, 2.0  # of the range that was seen


@dataclass(frozen=True)
class Tuned:
    """What was learned of one site.

    limits: of its input (None: it is not rounded). clip: the factor of the range of each group of its weight
    (out, groups) float32, as `kernels.grid.fit` takes it; 1 for rows that are not rounded. scale: what was folded
    before its input (in,) before anything was learned; None: nothing.
    """

    limits: Limits | None
    clip: Tensor
    scale: Tensor | None = None


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, bit for bit, with the gradient of `value`."""
    return rounded.detach() + (value - value.detach())


def round_between(values: Tensor, low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The nearest levels of the grids that span low .. high, differentiable in all three.

    values (..., in), low and high (..., groups), scales stored in `dtype`  ->  (..., in)
    """
    scale, zero = between(low.detach(), high.detach(), grid, dtype)
    if grid.symmetric:
        scale, zero = straight(torch.maximum(-low, high) / (grid.levels // 2 - 1), scale.float()), zero.float()
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = straight((high - low) / (grid.levels - 1), scale.float())
        zero = straight(-low / scale, zero.float())
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    steps = values.unflatten(-1, (scale.shape[-2], -1)) / scale
    codes = torch.minimum(torch.maximum(straight(steps, steps.round()), -zero), grid.levels - 1 - zero)
    return (codes * scale).flatten(-2)


def round_through(x: Tensor, grid: Grid, limits: Limits | None) -> Tensor:
    """`round_input` with fixed limits, whose gradient is that of x."""
    return straight(x, round_input(x.detach(), grid, limits))


class LearnedLinear(nn.Module):
    """A linear, its weight frozen, that rounds its weight and its input within ranges that are parameters.

    factors (2,): of the limits of the input that it begins with, low and high. clips: of each group's range, for every
    run of rows that is rounded (rows, groups), or one for all of a TENSOR grid.
    """

    start: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        scheme: Scheme,
        dtype: torch.dtype,
        limits: Limits | None,
        clips: list[Tensor],
    ) -> None:
        super().__init__()
        self.linear, self.scheme, self.dtype = linear, scheme, dtype
        self.register_buffer("start", torch.tensor([limits.low, limits.high] if limits else [0.0, 0.0]))
        self.factors = nn.Parameter(torch.ones(2))
        self.clips = nn.ParameterList(
            [nn.Parameter(clip[:1] if scheme.grid.group == TENSOR else clip) for clip in clips]
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._input(x), self._weight(), self.linear.bias)

    @property
    def limits(self) -> Limits | None:
        """Of the input, as they are now."""
        low, high = (self.start * self.factors).tolist()
        return Limits(low, high) if self.scheme.inputs else None

    @property
    def clip(self) -> Tensor:
        """The factor of every group's range as it is now (out, groups) float32; 1 for rows that are not rounded."""
        weight = self.linear.weight
        whole = torch.ones(len(weight), weight.shape[1] // self.scheme.grid.width(weight.shape[1]))
        for rows, clip in zip(self._runs, self.clips, strict=True):
            whole[rows] = clip.detach()
        return whole

    @torch.no_grad()
    def keep_within(self) -> None:
        """Put the parameters back within their bounds: a weight's range never exceeds its own."""
        self.factors.clamp_(NARROWEST, WIDEST)
        for clip in self.clips:
            clip.clamp_(NARROWEST, 1)

    @property
    def _runs(self) -> tuple[slice, ...]:
        return self.scheme.rows or (slice(0, len(self.linear.weight)),)

    def _input(self, x: Tensor) -> Tensor:
        grid = self.scheme.inputs
        if grid is None:
            return x
        low, high = self.start * self.factors
        if grid.group == TENSOR:
            return round_between(x, low.reshape(1), high.reshape(1), grid, torch.float32)
        x = torch.minimum(torch.maximum(x, low), high)
        groups = x.unflatten(-1, (-1, grid.width(x.shape[-1])))
        return round_between(x, groups.amin(-1), groups.amax(-1), grid, torch.float32)

    def _weight(self) -> Tensor:
        whole = self.linear.weight.clone()
        for rows, clip in zip(self._runs, self.clips, strict=True):
            whole[rows] = self._rounded_rows(self.linear.weight[rows], clip)
        return whole

    def _rounded_rows(self, weight: Tensor, clip: Tensor) -> Tensor:
        grid = self.scheme.grid
        groups = weight.unflatten(-1, (-1, grid.width(weight.shape[1])))
        low, high = groups.amin(-1), groups.amax(-1)
        if grid.group == TENSOR:
            low, high = low.amin().expand_as(low), high.amax().expand_as(high)
        return round_between(weight, low * clip, high * clip, grid, self.dtype)
