"""Every scheme of a recipe is a product that onnxruntime computes from packed codes, and equals the textbook's."""

import functools
import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from packed import textbook_input
from torch import nn

from vlmq.formats.onnx_finish import finish
from vlmq.kernels import nbits, products
from vlmq.kernels.graph_linear import GraphLinear
from vlmq.kernels.grid import BITS, ROW, TENSOR, Grid, Limits, QuantizedWeight, to_grid
from vlmq.kernels.linear import QuantizedLinear
from vlmq.kernels.products import product

COLUMNS = 96
UNEVEN = Limits(-1.1, 1.7)
WEIGHTS = [Grid(bits, group, even) for bits, group, even in itertools.product(BITS, (32, ROW, TENSOR), (True, False))]
TOKENS = [  # of an input: (grid, limits)
    (Grid(bits, group, even), limits)
    for bits, (group, limits), even in itertools.product(
        (4, 6, 8), ((ROW, None), (ROW, UNEVEN), (TENSOR, UNEVEN), (32, None)), (True, False)
    )
]
# weight and input of the same bits, and W4A8
ROUNDED = [
    (Grid(bits, group, even), inputs, limits)
    for group, even in ((ROW, True), (ROW, False), (TENSOR, True), (32, False))
    for inputs, limits in TOKENS
    for bits in {inputs.bits, 4}
]
CASES = [(grid, None, None) for grid in WEIGHTS] + ROUNDED


def weight_on(grid: Grid, rows: int = 24) -> QuantizedWeight:
    source = torch.Generator().manual_seed(grid.bits)
    return to_grid(torch.randn(rows, COLUMNS, generator=source), grid)


def tokens() -> torch.Tensor:
    """(2, 3, COLUMNS): tokens of all sizes, and one of zeros."""
    x = torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(1))
    x *= torch.tensor([0.01, 1.0, 100.0])[:, None]
    x[1, 0] = 0
    return x


class Side(nn.Module):
    """Linears that read the same input, so that one graph has them all."""

    def __init__(self, linears: list[nn.Module]) -> None:
        super().__init__()
        self.vlm = nn.ModuleList(linears)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [linear(x) for linear in self.vlm]


@functools.cache
def graph(level: int) -> tuple[ir.Model, list[np.ndarray]]:
    """One graph of all CASES at an accuracy level, and what onnxruntime makes of `tokens()`."""
    linears = []
    for grid, inputs, limits in CASES:
        linear = QuantizedLinear.from_weight(weight_on(grid), torch.linspace(-1, 1, 24), inputs, limits)
        linears.append(GraphLinear(linear, product(grid, inputs, level)))
    axes = ({0: "batch_size", 1: "sequence_length"},)
    program = torch.onnx.export(
        Side(linears).eval(), (torch.zeros(3, 4, COLUMNS),), dynamic_shapes=axes, opset_version=20, verbose=False
    )
    finish(program.model)
    session = onnxruntime.InferenceSession(
        ir.to_proto(program.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return program.model, session.run(None, {session.get_inputs()[0].name: tokens().numpy()})


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda index: str(index))
def test_a_graph_multiplies_what_the_textbook_rounds_with_the_weight_that_was_solved(case):
    grid, inputs, limits = CASES[case]
    x = tokens() if inputs is None else textbook_input(tokens(), inputs, limits)
    exact = x.double() @ weight_on(grid).dequantize().double().T + torch.linspace(-1, 1, 24)
    found = torch.from_numpy(graph(0)[1][case]).double()
    # float32 rounds a product to 2**-24 of the sizes that are summed
    sizes = x.double().abs() @ weight_on(grid).dequantize().double().abs().T + 1
    assert ((found - exact).abs() < 2e-6 * sizes).all(), CASES[case]


def test_every_kind_of_product_is_among_them():
    found = {(p.kind, p.simulated) for p in (product(grid, inputs) for grid, inputs, _ in CASES)}
    assert found == {("4", False), ("4+4", False), ("int8", False), ("4", True), ("4+4", True)}
    fast = {product(grid, inputs, 4).kind for grid, inputs, _ in CASES if inputs is None}
    assert fast == {"2", "4", "4+2", "8"}


@pytest.mark.parametrize("case", range(len(WEIGHTS)), ids=lambda index: str(WEIGHTS[index]))
def test_the_fast_level_is_as_near_as_activations_of_eight_bits_are(case):
    exact = tokens().double() @ weight_on(WEIGHTS[case]).dequantize().double().T + torch.linspace(-1, 1, 24)
    found = torch.from_numpy(graph(4)[1][case]).double()
    assert (found - exact).norm() < 0.02 * exact.norm()
    assert not torch.allclose(found, exact, rtol=1e-5)


@pytest.mark.parametrize("level", [0, 4])
def test_neither_two_nor_eight_bits_are_multiplied_in_float(level):
    model, _ = graph(level)
    seen = set()
    for node in model.graph:
        bits = {"MatMulNBits": ("bits",), "SplitMatMul": ("high_bits",)}.get(node.op_type, ())
        seen |= {(node.attributes[name].as_int(), node.attributes["accuracy_level"].as_int()) for name in bits}
    assert seen == ({(4, 0)} if level == 0 else {(2, 4), (4, 4), (8, 4), (4, 0)})  # 4, 0: after rounded inputs


def test_inputs_that_are_rounded_are_never_rounded_again():
    assert all(product(grid, inputs, 4).level == 0 for grid, inputs, _ in ROUNDED)


def held(grid: Grid) -> list[str]:
    """The kinds that can hold codes of a grid."""
    kinds = {2: ["2", "4"], 3: ["4"], 4: ["4"], 5: ["4+2", "4+4", "8"], 6: ["4+2", "4+4", "8"], 8: ["4+4", "8"]}
    return kinds[grid.bits] + (["int8"] if grid.group in (ROW, TENSOR) else [])


SHAPES = [(16, 64), (32, 96), (96, 192), (ROW, 60), (ROW, 72), (TENSOR, 72)]
HELD = [
    (grid, columns, kind)
    for bits, (group, columns), even in itertools.product(BITS, SHAPES, (True, False))
    for grid in [Grid(bits, group, even)]
    for kind in held(grid)
]


@pytest.mark.parametrize(("grid", "columns", "kind"), HELD, ids=str)
def test_what_a_product_reads_is_the_weight_bit_for_bit(grid, columns, kind):
    source = torch.Generator().manual_seed(grid.bits * columns)
    groups = columns // grid.width(columns)
    codes = torch.randint(grid.levels, (5, columns), generator=source, dtype=torch.uint8)
    zero = torch.randint(grid.levels, (5, groups), generator=source, dtype=torch.uint8)
    if grid.symmetric:
        zero.fill_(grid.levels // 2)
    weight = QuantizedWeight(codes, torch.rand(5, groups, generator=source).half() + 0.01, zero, grid)

    tensors = products.pack(nbits.pack(weight), kind)
    back = products.unpack(tensors, kind, columns, grid)
    for field in ("codes", "scale", "zero"):
        assert torch.equal(getattr(back, field), getattr(weight, field)), field
        assert getattr(back, field).dtype == getattr(weight, field).dtype, field
    assert set(tensors) <= set(products.PARTS)
    assert products.packed_bytes((5, columns), grid, kind) == sum(tensor.nbytes for tensor in tensors.values())


def test_six_bits_take_six_where_they_are_multiplied_in_int8():
    def stored(bits: int, level: int) -> float:
        kind = product(Grid(bits, 128), accuracy_level=level).kind
        return 8 * products.packed_bytes((1, 1280), Grid(bits, 128), kind) / 1280

    overhead = 16 / 128  # a scale of two bytes for each group
    assert stored(6, 4) == stored(5, 4) == 6 + overhead + 4 / 128  # and a zero of the low bits
    assert stored(6, 0) == stored(8, 0) == 8 + overhead + 4 / 128
    assert stored(3, 0) == stored(4, 4) == stored(2, 0) == 4 + overhead
    assert stored(2, 4) == 2 + overhead
