"""MatMulNBits' layout: onnxruntime's own operator is the oracle, and what was packed comes back."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from vlmq.kernels import nbits
from vlmq.kernels.grid import BITS, ROW, TENSOR, Grid, QuantizedWeight

# 60 columns end in a part of a byte, 72 in a part of a block
SHAPES = [(16, 64), (32, 96), (48, 96), (64, 192), (96, 192), (160, 320), (256, 512), (ROW, 60), (ROW, 72), (ROW, 256)]
SHAPES += [(TENSOR, 72), (TENSOR, 256)]


def random_weight(grid: Grid, columns: int, rows: int = 5) -> QuantizedWeight:
    """Every code and zero that the grid allows, scales of all sizes."""
    source = torch.Generator().manual_seed(grid.bits * columns)
    groups = columns // grid.width(columns)
    codes = torch.randint(grid.levels, (rows, columns), generator=source, dtype=torch.uint8)
    zero = torch.randint(grid.levels, (rows, groups), generator=source, dtype=torch.uint8)
    if grid.symmetric:
        zero.fill_(grid.levels // 2)
    scale = torch.rand(rows, groups, generator=source).half() + 0.001
    return QuantizedWeight(codes, scale, zero, grid)


def textbook(weight: QuantizedWeight) -> np.ndarray:
    """(codes - zero) * scale in float64, one element at a time."""
    rows, columns = weight.shape
    width = weight.grid.width(columns)
    dense = np.empty((rows, columns))
    for row in range(rows):
        for column in range(columns):
            level = int(weight.codes[row, column]) - int(weight.zero[row, column // width])
            dense[row, column] = level * float(weight.scale[row, column // width])
    return dense


def through_onnxruntime(packed: nbits.NBitsWeight, x: np.ndarray) -> np.ndarray:
    """x W^T by onnxruntime's MatMulNBits on the packed tensors."""
    tensors = {"B": packed.qweight, "scales": packed.scales.float()}
    if packed.qzeros is not None:
        tensors["zero_points"] = packed.qzeros
    weights = [ir.Value(name=name, const_value=ir.tensor(value.numpy(), name=name)) for name, value in tensors.items()]
    size = {
        "K": packed.columns,
        "N": packed.qweight.shape[0],
        "bits": nbits.CONTAINERS[packed.grid.bits],
        "block_size": packed.block,
        "accuracy_level": 0,
    }
    a = ir.Value(name="A", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
    y = ir.Value(name="Y", shape=ir.Shape((len(x), size["N"])), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMulNBits", [a, *weights], size, domain="com.microsoft", outputs=[y])
    opsets = {"": 20, "com.microsoft": 1}
    graph = ir.Graph([a], [y], nodes=[node], initializers=weights, opset_imports=opsets, name="one")
    session = onnxruntime.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"A": x})[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "columns"), SHAPES)
def test_what_is_packed_comes_back_bit_for_bit(bits, group, columns, symmetric):
    weight = random_weight(Grid(bits, group, symmetric), columns)
    back = nbits.unpack(nbits.pack(weight))
    for field in ("codes", "scale", "zero"):
        assert torch.equal(getattr(back, field), getattr(weight, field)), field
        assert getattr(back, field).dtype == getattr(weight, field).dtype, field
    assert torch.equal(nbits.dequantize(nbits.pack(weight)), weight.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "columns"), [(32, 96), (48, 96), (256, 512), (ROW, 60), (ROW, 256), (TENSOR, 72)])
def test_onnxruntime_multiplies_with_the_weight_that_was_packed(bits, group, columns, symmetric):
    weight = random_weight(Grid(bits, group, symmetric), columns)
    product = through_onnxruntime(nbits.pack(weight), np.eye(columns, dtype=np.float32))
    np.testing.assert_allclose(product.T, textbook(weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_one_flipped_bit_of_a_packed_weight_is_another_weight(bits):
    weight = random_weight(Grid(bits, 32, symmetric=False), 96)
    packed = nbits.pack(weight)
    packed.qweight[2, 1, 3] ^= 1
    changed = (nbits.unpack(packed).codes != weight.codes).nonzero().tolist()
    assert changed == [[2, 32 + 3 * 8 // nbits.CONTAINERS[bits]]]  # the low bit of a byte is in its first code


def test_four_bit_codes_lie_low_nibble_first():
    grid = Grid(4, 16, symmetric=False)
    codes = torch.arange(16, dtype=torch.uint8)[None]
    packed = nbits.pack(QuantizedWeight(codes, torch.ones(1, 1), torch.full((1, 1), 5, dtype=torch.uint8), grid))
    assert packed.qweight.flatten().tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert packed.qzeros.flatten().tolist() == [0x05]


@pytest.mark.parametrize("bits", BITS)
def test_a_symmetric_weight_stores_no_zeros(bits):
    assert nbits.pack(random_weight(Grid(bits, 32), 96)).qzeros is None


@pytest.mark.parametrize(("columns", "block"), [(256, 256), (1408, 128), (4304, 256)])
def test_a_row_is_cut_into_the_blocks_that_take_the_fewest_bytes(columns, block):
    assert nbits.block_of(Grid(4, ROW), columns) == block
    assert nbits.block_of(Grid(4, TENSOR), columns) == block
