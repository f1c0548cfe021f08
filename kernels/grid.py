"""The grid: which levels a quantized value may take, and the arithmetic between values and their codes.

A weight (out, in) is cut along its columns into groups; a group has one scale and one zero, and

    weight  ~  (codes - zero) * scale            codes and zero in 0 .. 2**bits - 1

Symmetric grids have zero = 2**(bits - 1) everywhere. The scale is rounded to the dtype it will be stored in
before any code is computed, so that what is written is what was solved.

The input of a linear (tokens, in) lies on a grid of the same kind: a row is a token. Its scales are computed as it
comes (`ROW`: per token; groups: per token and group), or lie between limits known beforehand (`TENSOR`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BITS = (2, 3, 4, 5, 6, 8)
ROW = -1
TENSOR = 0
ROWS = 64  # worked on at once, where that keeps what is in between in the processor's cache
ON_GPU = 2**24  # values worked on at once on a GPU, which is slow where it is given little to do


@dataclass(frozen=True)
class Grid:
    """The levels a value may take: 2**bits of them, spaced anew in every group."""

    bits: int
    group: int = 128  # columns that share a scale; ROW (-1) for the whole row, TENSOR (0) for all rows together
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"{self.bits} bits; choose one of {', '.join(map(str, BITS))}")
        if self.group not in (ROW, TENSOR) and not (16 <= self.group <= 256 and self.group % 16 == 0):
            raise ValueError(
                f"a group of {self.group} columns; choose a multiple of 16 from 16 to 256, or row, or tensor"
            )

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def stored(self) -> "Grid":
        """The grid that files know it as: the one scale of a whole tensor is repeated for every row."""
        return replace(self, group=ROW) if self.group == TENSOR else self

    def width(self, columns: int) -> int:
        """Columns of one group of a weight that has so many columns; ValueError where they do not divide."""
        width = columns if self.group in (ROW, TENSOR) else self.group
        if columns % width:
            fitting = [size for size in (16, 32, 64, 128, 256) if columns % size == 0]
            remedy = (
                f"choose --group-size {', '.join(map(str, fitting))} or row" if fitting else "choose --group-size row"
            )
            raise ValueError(f"{columns} columns do not divide into groups of {width}; {remedy}")
        return width


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on a grid: codes (out, in) uint8; scale (out, groups) float; zero (out, groups) uint8."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grid: Grid

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def to(self, device: torch.device) -> "QuantizedWeight":
        return QuantizedWeight(self.codes.to(device), self.scale.to(device), self.zero.to(device), self.grid)

    def slabs(self) -> Iterator["QuantizedWeight"]:
        """Some rows after the other: what is made of them passes through the processor's cache."""
        rows = at_once(self.codes)
        parts = zip(self.codes.split(rows), self.scale.split(rows), self.zero.split(rows), strict=True)
        return (QuantizedWeight(*part, self.grid) for part in parts)

    def dequantize(self) -> Tensor:
        """(out, in) float32: exact for 16-bit scales, whose product with a code has at most 24 significant bits."""
        weight = torch.empty(self.shape, dtype=torch.float32, device=self.codes.device)
        rows = at_once(self.codes)
        for number, slab in enumerate(self.slabs()):
            weight[number * rows : (number + 1) * rows] = dequantize(slab.codes, slab.scale, slab.zero)
        return weight


def fit(
    weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float16, clip: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Choose each group's scale and zero so that its extremes (shrunk by `clip`), and 0, lie on the grid.

    weight (..., out, in), clip broadcastable to (..., out, groups)  ->  scale of `dtype`, zero uint8, both
    (..., out, groups). A group of zeros gets scale 1.
    """
    low, high = extremes(weight, grid)
    return between(low * clip, high * clip, grid, dtype)


def extremes(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of each group: weight (..., out, in)  ->  two (..., out, groups) float32."""
    groups = weight.float().unflatten(-1, (-1, grid.width(weight.shape[-1])))
    low, high = groups.amin(-1), groups.amax(-1)
    if grid.group == TENSOR:
        low = low.amin(-2, keepdim=True).expand_as(low)
        high = high.amax(-2, keepdim=True).expand_as(high)
    return low, high


def between(low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale of `dtype` and zero uint8 of the grids whose levels span low .. high, and 0; any shape, kept."""
    if grid.symmetric:
        half = grid.levels // 2
        scale = torch.maximum(-low, high) / (half - 1)
        return _storable(scale, dtype), torch.full_like(scale, half).to(torch.uint8)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _storable((high - low) / (grid.levels - 1), dtype)
    zero = torch.round(-low / scale.float()).clamp(0, grid.levels - 1)
    return scale, zero.to(torch.uint8)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in the dtype it is stored in: never 0 (a group of zeros, or too small to hold), never infinite."""
    info = torch.finfo(dtype)
    stored = scale.clamp(max=info.max).to(dtype)
    stored = torch.where(stored == 0, torch.full_like(stored, info.smallest_normal), stored)
    return torch.where(scale == 0, torch.ones_like(stored), stored)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest codes: weight (..., out, in), scale and zero (..., out, groups)  ->  codes (..., out, in) uint8."""
    groups = weight.float().unflatten(-1, (scale.shape[-1], -1))
    codes = float_codes(groups, scale.float().unsqueeze(-1), zero.float().unsqueeze(-1), grid)
    return codes.to(torch.uint8).flatten(-2)


def float_codes(values: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest codes as float32, so that arithmetic goes on in place: all float32, scale and zero broadcastable."""
    return (values / scale).round_().add_(zero).clamp_(0, grid.levels - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """codes (..., out, in), scale and zero (..., out, groups)  ->  weight (..., out, in) float32."""
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    return (groups - zero.float().unsqueeze(-1)).mul_(scale.float().unsqueeze(-1)).flatten(-2)


def round_trip(weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float16, clip: Tensor | float = 1.0) -> Tensor:
    """The weight as its grid would store it, float32: fit, quantize and dequantize in one call."""
    return nearest(weight, *fit(weight, grid, dtype, clip), grid)


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """dequantize(quantize(weight)) bit for bit, without the detour over uint8: (..., out, in) float32."""
    groups = weight.float().unflatten(-1, (scale.shape[-1], -1))
    scale, zero = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
    return float_codes(groups, scale, zero, grid).sub_(zero).mul_(scale).flatten(-2)


@dataclass(frozen=True)
class Limits:
    """What the values of an input are clamped to before they are rounded, known from calibration."""

    low: float
    high: float


def round_input(x: Tensor, grid: Grid, limits: Limits | None = None) -> Tensor:
    """The input of a linear (..., in) as its grid holds it, in its own dtype; scales float32.

    A TENSOR grid spans the limits and needs them; others span what each token (or group) has, clamped to the limits.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    if limits and grid.group != TENSOR:
        rows = rows.clamp(limits.low, limits.high)
    if grid.group == TENSOR:
        if limits is None:
            raise ValueError("one range for a whole input must be known beforehand; calibrate it")
        edges = torch.tensor([[limits.low, limits.high]]).to(rows.device)
        scale, zero = between(edges[:, :1], edges[:, 1:], grid, torch.float32)
        scale, zero = scale.expand(len(rows), 1), zero.expand(len(rows), 1)
    else:
        scale, zero = fit(rows, grid, torch.float32)
    return nearest(rows, scale, zero, grid).reshape(x.shape).to(x.dtype)


def at_once(weight: Tensor) -> int:
    """How many rows of (out, in) are worked on together, where its device is."""
    return ROWS if weight.device.type == "cpu" else max(ROWS, ON_GPU // weight.shape[1])


def to_grid(
    weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float16, clip: Tensor | float = 1.0
) -> QuantizedWeight:
    """Round to nearest on the fitted grid: weight (out, in)."""
    scale, zero = fit(weight, grid, dtype, clip)
    rows = at_once(weight)
    slabs = zip(weight.split(rows), scale.split(rows), zero.split(rows), strict=True)
    codes = torch.cat([quantize(*slab, grid) for slab in slabs])
    return QuantizedWeight(codes, scale, zero, grid)
