"""The quantized linear computes what a dense linear with the dequantized weight computes, and keeps only codes."""

import pytest
import torch
from packed import textbook_input
from torch import nn
from torch.nn import functional as F

from vlmq.kernels.grid import BITS, ROW, TENSOR, Grid, Limits, to_grid
from vlmq.kernels.linear import QuantizedLinear


def layer_on(grid: Grid, shape=(48, 128), bias: bool = True, dtype: torch.dtype = torch.float16, **rounding):
    source = torch.Generator().manual_seed(0)
    weight = to_grid(torch.randn(shape, generator=source), grid, dtype)
    biases = torch.randn(shape[0], generator=source) if bias else None
    return QuantizedLinear.from_weight(weight, biases, **rounding), weight


def same(left, right) -> bool:
    pairs = [(getattr(left, field), getattr(right, field)) for field in ("codes", "scale", "zero")]
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [16, 32, 128, ROW])
def test_the_reference_is_a_dense_product_with_the_dequantized_weight(bits, group, symmetric):
    layer, weight = layer_on(Grid(bits, group, symmetric))
    x = torch.randn(2, 3, 128)
    assert torch.equal(layer(x), F.linear(x, weight.dequantize(), layer.bias))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [32, 64, 128, 96, ROW])
def test_the_fast_product_is_as_near_to_float64_as_bfloat16_is(bits, group, symmetric):
    columns = 192 if group == 96 else 128
    layer, weight = layer_on(Grid(bits, group, symmetric), (48, columns))
    layer.bfloat16().to_fast()
    assert layer.int4 is not None
    x = torch.randn(2, 3, columns).bfloat16()
    exact = F.linear(x.double(), weight.dequantize().double(), layer.bias.double())
    dense = F.linear(x, weight.dequantize().bfloat16(), layer.bias)
    assert layer(x).dtype == torch.bfloat16
    assert (layer(x) - exact).norm() < 2 * (dense - exact).norm()
    assert (layer(x) - exact).norm() < 5e-3 * exact.norm()


def test_other_dtypes_get_the_reference_from_the_fast_layout_too():
    layer, weight = layer_on(Grid(4, 32, symmetric=False))
    layer.to_fast()
    x = torch.randn(2, 3, 128)
    assert torch.equal(layer(x), F.linear(x, weight.dequantize(), layer.bias))


@pytest.mark.parametrize(
    ("grid", "shape"),
    [
        (Grid(4, 16), (48, 128)),  # groups torch has no product for
        (Grid(8, 32), (48, 128)),  # bits it has none for
        (Grid(4, 32), (40, 128)),  # rows that do not fill its tiles
        (Grid(4, ROW), (48, 72)),  # columns that do not fill the last block
    ],
)
def test_a_weight_without_a_fast_product_stays_as_it_is(grid, shape):
    layer, weight = layer_on(grid, shape)
    before = layer(torch.ones(1, shape[1]))
    layer.to_fast()
    assert not layer.has_fast
    assert layer.int4 is None
    assert torch.equal(layer(torch.ones(1, shape[1])), before)
    assert same(layer.quantized(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_weight_is_the_same_bits_after_the_fast_layout_and_back(bits, symmetric):
    layer, weight = layer_on(Grid(bits, 32, symmetric))
    packed = layer.qweight
    layer.to_fast()
    assert layer.qweight is None  # one copy of the codes at a time
    assert same(layer.quantized(), weight)
    layer.to_portable()
    assert torch.equal(layer.qweight, packed)
    assert same(layer.quantized(), weight)


@pytest.mark.parametrize("fast", [False, True])
def test_casting_the_model_keeps_the_scales_that_were_solved(fast):
    layer, weight = layer_on(Grid(4, 32, symmetric=False))
    if fast:
        layer.to_fast()
    layer.to(torch.bfloat16).float()
    assert same(layer.quantized(), weight)


def test_the_layer_holds_a_fraction_of_the_dense_bytes():
    layer, _ = layer_on(Grid(4, 64), (256, 512), bias=False)
    dense = nn.Linear(512, 256, bias=False, dtype=torch.float16)
    assert 3.7 * held(layer) < held(dense)
    layer.to_fast()
    assert 3.3 * held(layer) < held(dense)  # torch wants a scale and an offset for every group


UNEVEN = Limits(-1.1, 1.7)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(
    ("group", "limits"), [(ROW, None), (32, None), (TENSOR, UNEVEN), (ROW, UNEVEN), (32, UNEVEN)], ids=str
)
def test_an_input_on_a_grid_is_rounded_as_in_the_textbook_and_multiplied(group, limits, bits, symmetric):
    inputs = Grid(bits, group, symmetric)
    layer, weight = layer_on(Grid(4, 32), inputs=inputs, limits=limits)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(textbook_input(x, inputs, limits), x)
    assert torch.equal(layer(x), F.linear(textbook_input(x, inputs, limits), weight.dequantize(), layer.bias))


def test_every_token_has_a_range_of_its_own_whatever_the_shape_of_the_input():
    layer, _ = layer_on(Grid(8, ROW), inputs=Grid(4, ROW))
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 6).unsqueeze(1)
    together = layer(x.view(2, 3, 128)).view(6, -1)
    for token, alone in zip(x, together, strict=True):
        assert (layer(token) - alone).norm() < 1e-5 * alone.norm()


@pytest.mark.parametrize(("inputs", "limits"), [(Grid(8, ROW), None), (Grid(4, 32), None), (Grid(8, TENSOR), UNEVEN)])
def test_the_fast_product_rounds_its_input_too(inputs, limits):
    layer, _ = layer_on(Grid(4, 32), inputs=inputs, limits=limits)
    layer.bfloat16().to_fast()
    assert layer.int4 is not None
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    plain, _ = layer_on(Grid(4, 32))
    plain.bfloat16().to_fast()
    assert torch.equal(layer(x), plain(textbook_input(x, inputs, limits)))
    assert not torch.equal(layer(x), plain(x))


def test_a_layer_without_a_grid_for_its_input_reads_it_as_it_is():
    layer, weight = layer_on(Grid(4, 32), limits=UNEVEN)
    x = torch.randn(2, 3, 128)
    assert torch.equal(layer(x), F.linear(x, weight.dequantize(), layer.bias))


def test_one_range_without_limits_and_groups_that_do_not_divide_are_refused_at_birth():
    with pytest.raises(ValueError, match="limits"):
        layer_on(Grid(4, 32), inputs=Grid(8, TENSOR))
    with pytest.raises(ValueError, match="128 columns"):
        layer_on(Grid(4, 32), inputs=Grid(8, 48))


def test_a_tracer_is_not_given_the_reference_whose_weight_it_would_hold_dense():
    layer, _ = layer_on(Grid(4, 32))
    with pytest.raises(Exception, match="would hold dense weights"):
        torch.onnx.export(layer.eval(), (torch.ones(2, 128),), dynamo=True, verbose=False)


def test_a_weight_with_one_scale_is_multiplied_like_any_other():
    layer, weight = layer_on(Grid(8, TENSOR))
    assert len(weight.scale.unique()) == 1
    x = torch.randn(2, 3, 128)
    assert torch.equal(layer(x), F.linear(x, weight.dequantize(), layer.bias))
    assert same(layer.quantized(), weight)


def held(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
