"""The grid: which levels a quantized weight may take, and the arithmetic between a weight and its codes.

A weight (out, in) is cut along its columns into groups; a group has one scale and one zero, and

    weight  ~  (codes - zero) * scale            codes and zero in 0 .. 2**bits - 1

Symmetric grids have zero = 2**(bits - 1) everywhere. The scale is rounded to the dtype it will be stored in
before any code is computed, so that what is written is what was solved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 3, 4, 5, 6, 8)
ROW = -1


@dataclass(frozen=True)
class Grid:
    """The levels a value may take: 2**bits of them, spaced anew in every group."""

    bits: int
    group: int = 128  # columns that share a scale; ROW (-1) for the whole row
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"{self.bits} bits; choose one of {', '.join(map(str, BITS))}")
        if self.group != ROW and not (16 <= self.group <= 256 and self.group % 16 == 0):
            raise ValueError(
                f"a group of {self.group} columns; choose a multiple of 16 from 16 to 256, or -1 for the row"
            )

    @property
    def levels(self) -> int:
        return 2**self.bits

    def width(self, columns: int) -> int:
        """Columns of one group of a weight that has so many columns; ValueError where they do not divide."""
        width = columns if self.group == ROW else self.group
        if columns % width:
            fitting = [size for size in (16, 32, 64, 128, 256) if columns % size == 0]
            remedy = (
                f"choose --group-size {', '.join(map(str, fitting))} or -1" if fitting else "choose --group-size -1"
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

    def dequantize(self) -> Tensor:
        """(out, in) float32: exact for 16-bit scales, whose product with a code has at most 24 significant bits."""
        return dequantize(self.codes, self.scale, self.zero)


def fit(
    weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float16, clip: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Choose each group's scale and zero so that its extremes (shrunk by `clip`), and 0, lie on the grid.

    weight (..., out, in), clip broadcastable to (..., out, groups)  ->  scale of `dtype`, zero uint8, both
    (..., out, groups). A group of zeros gets scale 1.
    """
    groups = weight.float().unflatten(-1, (-1, grid.width(weight.shape[-1])))
    if grid.symmetric:
        half = grid.levels // 2
        scale = groups.abs().amax(-1) * clip / (half - 1)
        zero = torch.full_like(scale, half)
        return _storable(scale, dtype), zero.to(torch.uint8)
    low = groups.amin(-1).clamp(max=0) * clip
    high = groups.amax(-1).clamp(min=0) * clip
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
    codes = torch.round(groups / scale.float().unsqueeze(-1)) + zero.float().unsqueeze(-1)
    return codes.clamp_(0, grid.levels - 1).to(torch.uint8).flatten(-2)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """codes (..., out, in), scale and zero (..., out, groups)  ->  weight (..., out, in) float32."""
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    return ((groups - zero.float().unsqueeze(-1)) * scale.float().unsqueeze(-1)).flatten(-2)


def round_trip(weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float16, clip: Tensor | float = 1.0) -> Tensor:
    """The weight as its grid would store it, float32: dequantize(quantize(fit)) in one call."""
    scale, zero = fit(weight, grid, dtype, clip)
    return dequantize(quantize(weight, scale, zero, grid), scale, zero)


def to_grid(
    weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float16, clip: Tensor | float = 1.0
) -> QuantizedWeight:
    """Round to nearest on the fitted grid."""
    scale, zero = fit(weight, grid, dtype, clip)
    return QuantizedWeight(quantize(weight, scale, zero, grid), scale, zero, grid)
