"""The layout of onnxruntime's MatMulNBits, to and from codes, scale and zero.

A row of the weight is cut into blocks of 16, 32, 64, 128 or 256 columns; every block has one scale and one zero.

    qweight  uint8 (out, blocks, block * container // 8)       codes, lowest bits first
    scales         (out, blocks)                               the grid's scale, in its own dtype
    qzeros   uint8 (out, ceil(blocks * container / 8)) | None  zeros, lowest bits first; None: 2**(container - 1)

A container has 2, 4 or 8 bits, so 3-bit codes lie in 4 and 5- and 6-bit codes in 8, codes and zeros shifted to the
container's middle; a symmetric grid's zero is then the container's own and need not be stored. A group that is no
block is several blocks with the same scale. Columns that fill up the last block hold the code of 0.

Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq.kernels.grid import ROW, Grid, QuantizedWeight

BLOCKS = (256, 128, 64, 32, 16)
CONTAINERS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}


@dataclass(frozen=True)
class NBitsWeight:
    """A packed weight (shapes above), and what is needed to read it: its columns and its grid."""

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    columns: int
    grid: Grid

    @property
    def container(self) -> int:
        return CONTAINERS[self.grid.bits]

    @property
    def block(self) -> int:
        return self.qweight.shape[-1] * 8 // self.container


def block_of(grid: Grid, columns: int) -> int:
    """Columns of one block. A row may use any, for its last block may be part empty: the one with the fewest bytes."""
    if grid.stored.group == ROW:
        bits = CONTAINERS[grid.bits]
        scale = 32  # bits of a scale in a float32 graph
        return min(BLOCKS, key=lambda block: -(-columns // block) * (block * bits + scale))
    return next(block for block in BLOCKS if grid.group % block == 0)


def pack(weight: QuantizedWeight) -> NBitsWeight:
    """Lay out a weight (out, in) for MatMulNBits; `unpack` gives the same weight back, bit for bit."""
    grid, (rows, columns) = weight.grid, weight.shape
    container, block = CONTAINERS[grid.bits], block_of(grid, columns)
    blocks = -(-columns // block)
    shift = _shift(grid)

    zeros = _spread(weight.zero + shift, blocks, block, columns)
    codes = zeros.repeat_interleave(block, dim=1)  # whatever is not overwritten dequantizes to 0
    codes[:, :columns] = weight.codes + shift
    return NBitsWeight(
        qweight=to_bytes(codes, container).view(rows, blocks, -1),
        scales=_spread(weight.scale, blocks, block, columns),
        qzeros=None if grid.symmetric else to_bytes(zeros, container),
        columns=columns,
        grid=grid,
    )


def packed_bytes(shape: tuple[int, int], grid: Grid, scale_bytes: int = 2) -> int:
    """Bytes of a weight of `shape` (out, in) in this layout, its scales stored in `scale_bytes` each."""
    (rows, columns), container, block = shape, CONTAINERS[grid.bits], block_of(grid, shape[1])
    blocks = -(-columns // block)
    zeros = 0 if grid.symmetric else -(-blocks * container // 8)
    return rows * (blocks * (block * container // 8 + scale_bytes) + zeros)


def unpack(packed: NBitsWeight) -> QuantizedWeight:
    """The weight that was packed: the same codes, scale and zero."""
    grid, columns = packed.grid, packed.columns
    container, block = CONTAINERS[grid.bits], packed.block
    blocks = packed.scales.shape[1]
    shift = _shift(grid)

    codes = from_bytes(packed.qweight.flatten(1), container)[:, :columns] - shift
    if packed.qzeros is None:
        zeros = torch.full_like(packed.scales, grid.levels // 2, dtype=torch.uint8)
    else:
        zeros = from_bytes(packed.qzeros, container)[:, :blocks] - shift
    per_group = blocks if grid.stored.group == ROW else grid.group // block
    return QuantizedWeight(
        codes=codes.contiguous(),
        scale=packed.scales[:, ::per_group].contiguous(),
        zero=zeros[:, ::per_group].contiguous(),
        grid=grid,
    )


def dequantize(packed: NBitsWeight) -> Tensor:
    """(out, in) float32: what `unpack(packed).dequantize()` gives, bit for bit, in a quarter of the time."""
    bits, (rows, blocks, size) = CONTAINERS[packed.grid.bits], packed.qweight.shape
    per_byte = 8 // bits
    weight = torch.empty(rows, blocks * size, per_byte, device=packed.qweight.device)
    for place in range(per_byte):
        weight[..., place] = packed.qweight.flatten(1) >> place * bits & 2**bits - 1
    weight = weight.view(rows, blocks, -1)
    if packed.qzeros is None:
        weight -= 2 ** (bits - 1)
    else:
        weight -= from_bytes(packed.qzeros, bits)[:, :blocks].unsqueeze(-1)
    weight *= packed.scales.float().unsqueeze(-1)
    return weight.flatten(1)[:, : packed.columns]


def _shift(grid: Grid) -> int:
    """What is added to a grid's codes and zeros to centre them in their container."""
    return 2 ** (CONTAINERS[grid.bits] - 1) - grid.levels // 2


def _spread(values: Tensor, blocks: int, block: int, columns: int) -> Tensor:
    """One value a group (out, groups)  ->  one a block (out, blocks)."""
    width = columns // values.shape[1]
    first_columns = torch.arange(blocks, device=values.device) * block
    return values[:, first_columns // width]


def to_bytes(values: Tensor, bits: int) -> Tensor:
    """(out, n) uint8 below 2**bits  ->  (out, ceil(n * bits / 8)) uint8, lowest bits first, filled up with 0."""
    per_byte = 8 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    packed = values[..., 0].clone()
    for place in range(1, per_byte):
        packed |= values[..., place] << (place * bits)
    return packed


def from_bytes(packed: Tensor, bits: int) -> Tensor:
    """(out, bytes) uint8  ->  (out, bytes * 8 / bits) uint8: undoes `to_bytes`, fill included."""
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> places & (2**bits - 1)).flatten(1)
