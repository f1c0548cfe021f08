import numpy as np
import pytest
import torch

from vlmq.kernels.grid import BITS, ROW, TENSOR, Grid, dequantize, fit, quantize, round_trip, to_grid


def textbook(weight, bits, group, symmetric):
    """Nearest level of every group's grid, in float64, one group at a time; scales rounded to float16."""
    weight = weight.double().numpy()
    out = np.empty_like(weight)
    group = weight.shape[1] if group == ROW else group
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            values = weight[row, start : start + group]
            if symmetric:
                scale = float(np.float16(np.float32(np.abs(values).max()) / np.float32(2 ** (bits - 1) - 1)))
                levels = (np.arange(2**bits) - 2 ** (bits - 1)) * scale
            else:
                low, high = min(values.min(), 0.0), max(values.max(), 0.0)
                scale = float(np.float16(np.float32(high - low) / np.float32(2**bits - 1)))
                levels = (np.arange(2**bits) - np.round(-low / scale)) * scale
            out[row, start : start + group] = levels[np.abs(values[:, None] - levels).argmin(1)]
    return out


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, ROW])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_takes_the_nearest_level_of_its_group(bits, group, symmetric):
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(bits))
    found = to_grid(weight, Grid(bits, group, symmetric)).dequantize().double().numpy()
    expected = textbook(weight, bits, group, symmetric)
    # Two levels can be equally near: compare the distances, which a wrong level would change.
    np.testing.assert_allclose(np.abs(found - weight.numpy()), np.abs(expected - weight.numpy()), atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_stays_zero_and_a_group_of_zeros_stays_finite(symmetric):
    weight = torch.randn(2, 64)
    weight[:, 10] = 0
    weight[1, 32:] = 0
    found = to_grid(weight, Grid(4, 32, symmetric)).dequantize()
    assert (found[:, 10] == 0).all()
    assert (found[1, 32:] == 0).all()


def test_a_weight_on_the_grid_is_kept_bit_for_bit():
    grid = Grid(4, 32)
    once = to_grid(torch.randn(8, 64), grid)
    codes = quantize(once.dequantize(), once.scale, once.zero, grid)
    assert torch.equal(codes, once.codes)


def test_the_product_of_code_and_half_precision_scale_is_exact_in_float32():
    weight = to_grid(torch.randn(4, 64), Grid(8, 32, symmetric=False))
    groups = weight.codes.double().unflatten(1, (2, 32)) - weight.zero.double().unsqueeze(-1)
    exact = (groups * weight.scale.double().unsqueeze(-1)).flatten(1)
    assert torch.equal(dequantize(weight.codes, weight.scale, weight.zero).double(), exact)


def test_a_scale_too_small_for_its_dtype_is_not_rounded_to_zero():
    scale, _ = fit(torch.full((1, 32), 1e-9), Grid(4, 32), torch.float16)
    assert scale.min() > 0


@pytest.mark.parametrize(("bits", "group"), [(7, 64), (1, 64), (16, 64), (4, 8), (4, 24), (4, 512), (4, -2)])
def test_a_grid_that_no_kernel_has_is_refused_at_birth(bits, group):
    with pytest.raises(ValueError, match="choose"):
        Grid(bits, group)


def test_a_group_that_no_kernel_has_names_those_that_are():
    with pytest.raises(
        ValueError, match=r"^a group of 50 columns; choose a multiple of 16 from 16 to 256, or row, or tensor$"
    ):
        Grid(4, 50)


def test_a_group_that_does_not_divide_names_those_that_do():
    with pytest.raises(
        ValueError, match=r"96 columns do not divide into groups of 64; choose --group-size 16, 32 or row"
    ):
        Grid(4, 64).width(96)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("group", [32, ROW, TENSOR])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_round_trip_is_what_its_codes_say_bit_for_bit(dtype, group, symmetric):
    weight, grid = torch.randn(150, 64, generator=torch.Generator().manual_seed(0)), Grid(4, group, symmetric)
    scale, zero = fit(weight, grid, dtype, 0.7)
    said = dequantize(quantize(weight, scale, zero, grid), scale, zero)
    found = round_trip(weight, grid, dtype, 0.7)
    assert torch.equal(found.view(torch.int32), said.view(torch.int32))  # 0 and -0 are told apart


@pytest.mark.parametrize("group", [32, ROW, TENSOR])
def test_rows_are_rounded_alike_however_many_are_worked_on_at_once(group, monkeypatch):
    weight, grid = torch.randn(150, 64, generator=torch.Generator().manual_seed(0)), Grid(4, group)
    found = to_grid(weight, grid)
    monkeypatch.setattr("vlmq.kernels.grid.ROWS", 1000)
    assert torch.equal(found.codes, to_grid(weight, grid).codes)
