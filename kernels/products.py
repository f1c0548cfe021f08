"""How onnxruntime multiplies by a quantized weight: which of its products, and the tensors they read.

One linear, or embedding, becomes one of

    2, 4 or 8   MatMulNBits on containers of so many bits (kernels/nbits.py)
    4+2, 4+4    two MatMulNBits, of the low four bits of a code and of the bits above:  y = low + 16 high
    int8        a product of integers, exact: codes int8 (in, out), inputs uint8
    lookup      no product: a table of tokens, of which rows are dequantized (kernels/graph_embedding.py)

and one of the first two with its input rounded beforehand in floating point, `simulated`, where the grids have groups
that no product on integers knows.

Which, follows from how long onnxruntime 1.31 takes on one thread of a CPU for a 2560 x 10240 weight and one row. In
milliseconds, float32 being 5.0: 4 bits 2.0 to 2.4 at accuracy_level 0 and 0.4 to 1.0 at 4; 2 bits 126 to 134 and 0.3 to
0.8; 8 bits 139 and 1.3 to 1.9. So neither 2 nor 8 bits are multiplied below level 4, and five and six bits are 4+2 at
level 4, which is smaller than 8 and faster. Codes of 3 bits are in 4: unpacked by standard operators, they would be
folded to a dense weight when the graph is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from vlmq.kernels import nbits
from vlmq.kernels.grid import ROW, TENSOR, Grid, QuantizedWeight
from vlmq.kernels.nbits import NBitsWeight

PARTS = ("qweight", "scales", "qzeros", "qweight_high", "qzeros_high")
INT8_ACTIVATIONS = 4  # the accuracy_level at which MatMulNBits computes in int8
EXACT = {2: (4,), 3: (4,), 4: (4,), 5: (4, 4), 6: (4, 4), 8: (4, 4)}  # bits of a grid to containers, at level 0
INT8 = {2: (2,), 3: (4,), 4: (4,), 5: (4, 2), 6: (4, 2), 8: (8,)}  # the same at level 4

INTEGERS: Final = "int8"
LOOKUP: Final = "lookup"
Kind = Literal["2", "4", "8", "4+2", "4+4", "int8", "lookup"]
KINDS: dict[tuple[int, ...], Kind] = {(2,): "2", (4,): "4", (8,): "8", (4, 2): "4+2", (4, 4): "4+4"}


@dataclass(frozen=True)
class Product:
    """The product of one linear. level: MatMulNBits' accuracy_level. simulated: the input is rounded beforehand."""

    kind: Kind
    level: int = 0
    simulated: bool = False

    @property
    def containers(self) -> tuple[int, ...]:
        """Bits of the containers of a code, low bits first."""
        return (8,) if self.kind == INTEGERS else tuple(int(bits) for bits in self.kind.split("+"))


def product(grid: Grid, inputs: Grid | None = None, accuracy_level: int = 0) -> Product:
    """The product of a linear whose weight is on `grid`, and its input on `inputs` (None: left as it comes)."""
    if inputs is not None and grid.stored.group == ROW and inputs.group in (ROW, TENSOR):
        return Product(INTEGERS)
    # A rounded input that was rounded to int8 again would be on another grid.
    level = INT8_ACTIVATIONS if accuracy_level == INT8_ACTIVATIONS and inputs is None else 0
    return Product(KINDS[(INT8 if level else EXACT)[grid.bits]], level, inputs is not None)


def unsaid(grid: Grid) -> Kind:
    """The kind in a graph that does not name it, as earlier releases wrote: one container, the next larger."""
    return KINDS[(nbits.CONTAINERS[grid.bits],)]


def pack(packed: NBitsWeight, kind: Kind) -> dict[str, Tensor]:
    """The tensors that the product reads, by name; `unpack` gives the weight back, bit for bit.

    qweight, scales, qzeros         of a single container: as in nbits.py, zeros where the grid is asymmetric
    qweight, scales, qzeros,        of two: the low four bits, zeros always; the scales are of both
    qweight_high, qzeros_high       the bits above
    qweight  int8 (in, out), scales (out,), qzeros int8 (out,)      of int8: less half of the grid's levels
    """
    if kind == INTEGERS:
        weight = nbits.unpack(packed)
        half = weight.grid.levels // 2
        tensors = {"qweight": (weight.codes.short() - half).to(torch.int8).T.contiguous(), "scales": weight.scale[:, 0]}
        if not weight.grid.symmetric:
            tensors["qzeros"] = (weight.zero[:, 0].short() - half).to(torch.int8)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}
    containers = Product(kind).containers
    tensors = {"scales": packed.scales}
    if len(containers) == 1:
        tensors["qweight"] = _codes(packed.qweight, packed.container, containers[0])
        if packed.qzeros is not None:
            tensors["qzeros"] = _zeros(packed, packed.container, containers[0])
        return tensors
    zeros = _zeros8(packed)
    for part, bits, shift, centre in (("", 4, 0, 0), ("_high", containers[1], 4, _centre(containers[1]))):
        codes = (packed.qweight.flatten(1) >> shift & 15) - centre
        tensors[f"qweight{part}"] = nbits.to_bytes(codes, bits).view(*packed.scales.shape, -1)
        if not (part and packed.qzeros is None):  # the middle of the upper container is what MatMulNBits assumes
            tensors[f"qzeros{part}"] = nbits.to_bytes((zeros >> shift & 15) - centre, bits)
    return tensors


def unpack(tensors: Mapping[str, Tensor], kind: Kind, columns: int, grid: Grid) -> QuantizedWeight:
    """The weight (out, columns) whose tensors these are; KeyError where one is missing."""
    qweight, scales = tensors["qweight"], tensors["scales"]
    if kind == INTEGERS:
        half = grid.levels // 2
        zero = tensors["qzeros"].short() + half if not grid.symmetric else torch.full(scales.shape, half)
        codes = (qweight.T.short() + half).to(torch.uint8).contiguous()
        return QuantizedWeight(codes, scales[:, None].contiguous(), zero[:, None].to(torch.uint8), grid)
    own, blocks = nbits.CONTAINERS[grid.bits], scales.shape[1]
    if kind == LOOKUP:
        return nbits.unpack(NBitsWeight(qweight.view(*scales.shape, -1), scales, tensors.get("qzeros"), columns, grid))
    containers = Product(kind).containers
    if len(containers) == 1:
        qweight = _codes(qweight, containers[0], own)
        zeros = None
        if not grid.symmetric:
            values = nbits.from_bytes(tensors["qzeros"], containers[0])[:, :blocks]
            zeros = nbits.to_bytes(_recentred(values, containers[0], own), own)
        return nbits.unpack(NBitsWeight(qweight, scales, zeros, columns, grid))
    centre = _centre(containers[1])
    high = nbits.from_bytes(tensors["qweight_high"].flatten(1), containers[1]) + centre
    qweight = (nbits.from_bytes(qweight.flatten(1), 4) | high << 4).view(*scales.shape, -1)
    zeros = None
    if not grid.symmetric:
        high = nbits.from_bytes(tensors["qzeros_high"], containers[1])[:, :blocks] + centre
        zeros = nbits.from_bytes(tensors["qzeros"], 4)[:, :blocks] | high << 4
    return nbits.unpack(NBitsWeight(qweight, scales, zeros, columns, grid))


def packed_bytes(shape: tuple[int, int], grid: Grid, kind: Kind, scale_bytes: int = 2) -> int:
    """Bytes of the tensors of a weight of `shape` (out, in), its scales stored in `scale_bytes` each."""
    rows, columns = shape
    if kind == INTEGERS:
        return rows * (columns + scale_bytes + (0 if grid.symmetric else 1))
    block = nbits.block_of(grid, columns)
    blocks = -(-columns // block)
    containers = Product(kind).containers
    zeros = sum(-(-blocks * bits // 8) for bits in containers)
    if grid.symmetric:
        zeros = 0 if len(containers) == 1 else -(-blocks * 4 // 8)
    return rows * (blocks * (sum(block * bits // 8 for bits in containers) + scale_bytes) + zeros)


def _centre(bits: int) -> int:
    """What is taken off the upper four bits of an 8-bit container, so that 8, its middle, is that of `bits`."""
    return 8 - 2 ** (bits - 1)


def _recentred(values: Tensor, bits: int, other: int) -> Tensor:
    return values + 2 ** (other - 1) - 2 ** (bits - 1)


def _codes(qweight: Tensor, bits: int, other: int) -> Tensor:
    """Codes (out, blocks, bytes) in a container of other bits."""
    if bits == other:
        return qweight
    codes = _recentred(nbits.from_bytes(qweight.flatten(1), bits), bits, other)
    return nbits.to_bytes(codes, other).view(*qweight.shape[:2], -1)


def _zeros(packed: NBitsWeight, bits: int, other: int) -> Tensor:
    assert packed.qzeros is not None
    values = nbits.from_bytes(packed.qzeros, bits)[:, : packed.scales.shape[1]]
    return nbits.to_bytes(_recentred(values, bits, other), other)


def _zeros8(packed: NBitsWeight) -> Tensor:
    """The zeros (out, blocks) of an 8-bit container."""
    if packed.qzeros is None:
        return torch.full(packed.scales.shape, 128, dtype=torch.uint8)
    return packed.qzeros
