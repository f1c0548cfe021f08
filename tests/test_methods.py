import pytest
import torch

from vlmq.exporter.methods import awq, rtn
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.statistics import Statistics, output_loss
from vlmq.kernels.grid import ROW, Grid, to_grid

HALF = torch.float16


@pytest.fixture
def inputs():
    """Token rows with a few channels much larger than the rest, as in real language models."""
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    x[:, [3, 17, 40]] *= 25
    return x


@pytest.fixture
def weight():
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(1))


def seen(x):
    statistics = Statistics.empty(x.shape[1])
    for part in x.split(100):
        statistics.add(part)
    return statistics


def test_statistics_added_up_in_parts_equal_those_of_the_whole(inputs):
    found = seen(inputs)
    exact = inputs.double()
    torch.testing.assert_close(found.gram.double(), exact.T @ exact, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(found.mean_absolute.double(), exact.abs().mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.maximum, inputs.abs().amax(0))
    assert found.tokens == 512


def test_the_loss_from_the_gram_matrix_is_the_squared_error_of_the_outputs(inputs, weight):
    error = to_grid(weight, Grid(3, 32)).dequantize() - weight
    direct = (inputs.double() @ error.double().T).square().sum()
    torch.testing.assert_close(output_loss(error, seen(inputs).gram).double(), direct, rtol=1e-5, atol=0)


def test_statistics_of_a_scaled_input_need_no_second_look_at_it(inputs):
    scale = torch.rand(64) + 0.5
    found, expected = seen(inputs).divided_by(scale), seen(inputs / scale)
    torch.testing.assert_close(found.gram, expected.gram, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(found.mean_absolute, expected.mean_absolute)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scale_awq_chooses_is_that_of_an_exhaustive_search_on_the_outputs(inputs, weight, bits):
    """The oracle quantizes for each exponent and measures the outputs of real tokens in float64."""
    grid = Grid(bits, 32)
    statistics = seen(inputs)

    def loss(exponent):
        scale = inputs.double().abs().mean(0) ** exponent
        scale = (scale / (scale.max() * scale.min()).sqrt()).float()
        quantized = to_grid(weight * scale, grid, HALF).dequantize() / scale
        return (inputs.double() @ (quantized - weight).double().T).square().sum().item()

    best = min((step / 20 for step in range(20)), key=loss)
    found = awq.rescale([weight], statistics, [grid], HALF)
    torch.testing.assert_close(found, awq.candidate(statistics, best))
    assert best > 0  # fault 1: a search that always picks "no scaling"
    assert loss(best) < 0.5 * loss(0)


def test_linears_that_read_one_input_share_the_scale_that_is_best_for_all(inputs, weight):
    statistics, grid = seen(inputs), Grid(3, 32)
    other = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))
    together = awq.rescale([weight, other], statistics, [grid, grid], HALF)
    stacked = awq.rescale([torch.cat([weight, other])], statistics, [grid], HALF)
    assert torch.equal(together, stacked)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, ROW])
def test_clipping_lowers_every_group_s_own_error_or_leaves_it(inputs, weight, symmetric, group):
    statistics, grid = seen(inputs), Grid(3, group, symmetric)
    width = grid.width(64)
    plain, clipped = (method.solve(weight, statistics, grid, HALF).dequantize() for method in (rtn, awq))

    def group_losses(found):
        error = (found - weight).double().unflatten(1, (-1, width))
        x = inputs.double().unflatten(1, (-1, width))
        return torch.einsum("tgw,ogw->ogt", x, error).square().sum(-1)

    before, after = group_losses(plain), group_losses(clipped)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("method", METHODS)
def test_quantizing_stacked_rows_equals_quantizing_them_apart(method, inputs, weight):
    solve, grid = METHODS[method].solve, Grid(4, 32)
    statistics = seen(inputs)
    whole = solve(weight, statistics, grid, HALF)
    for rows in (slice(0, 16), slice(16, 32), slice(32, 48)):
        part = solve(weight[rows], statistics, grid, HALF)
        assert torch.equal(part.codes, whole.codes[rows])
        assert torch.equal(part.scale, whole.scale[rows])


def test_the_extremes_of_a_scale_are_each_other_s_inverse(inputs):
    """So a fold neither overflows nor underflows half precision, however large the inputs are."""
    scale = awq.candidate(seen(inputs * 1e4), 0.95)
    torch.testing.assert_close(scale.max() * scale.min(), torch.tensor(1.0))
    assert scale.max() > 2
