from dataclasses import replace

import pytest
import torch

from vlmq.exporter.methods import group_aware, smoothquant
from vlmq.exporter.methods.problem import Problem
from vlmq.exporter.methods.rounded import limits_of, rounded_loss
from vlmq.exporter.scheme import Options, Scheme
from vlmq.exporter.sums import Sums
from vlmq.kernels.grid import ROW, TENSOR, Grid, Limits

HALF = torch.float16


@pytest.fixture
def x():
    rows = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    rows[:, [3, 17, 40]] *= 40
    return rows


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 64, generator=generator) for rows in (48, 16)]


def problem(x, weights, grid, inputs, **options):
    sums = Sums(x.shape[1])
    sums.add(x, keep=len(x))
    schemes = [Scheme("smoothquant", grid, inputs, options=Options(**options))] * len(weights)
    return Problem(weights, schemes, sums.statistics(), HALF, lambda scale: 0.0)


def loss(asked, scale):
    return rounded_loss(asked, scale, [asked.statistics.rows @ weight.T for weight in asked.weights])


def nearest(values, grid, rows_low, rows_high, scale_dtype):
    """float64: the nearest level of the symmetric grid between a low and a high that each value is given."""
    half = 2 ** (grid.bits - 1)
    step = torch.maximum(-rows_low, rows_high) / (half - 1)
    step = step.float().to(scale_dtype).double()
    return (values / step).round().clamp(-half, half - 1) * step


def textbook_loss(x, weights, scale, grid, inputs):
    """sum ||Q(W s) Q(x / s) - W x||^2 in float64, per tensor, token or group, written without vlmq's grids."""
    x, scale = x.double(), scale.double()

    def rounded(values, which, dtype):
        if which.group == TENSOR:
            extremes = values.min(), values.max()
            return nearest(values, which, extremes[0], extremes[1], dtype)
        width = values.shape[1] if which.group == ROW else which.group
        groups = values.unflatten(1, (-1, width))
        return nearest(groups, which, groups.amin(-1, True), groups.amax(-1, True), dtype).flatten(1)

    inner = rounded(x / scale, inputs, torch.float32)
    outer = [rounded(weight.double() * scale, grid, HALF) for weight in weights]
    return sum(
        (inner @ quantized.T - x @ weight.double().T).square().sum().item()
        for quantized, weight in zip(outer, weights, strict=True)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_a_fixed_migration_strength_gives_equation_4(x, weights, alpha):
    found = smoothquant.rescale(problem(x, weights, Grid(8, ROW), Grid(8, ROW), alpha=alpha)).double()
    stacked = torch.cat(weights).double()
    expected = x.double().abs().amax(0) ** alpha / stacked.abs().amax(0) ** (1 - alpha)
    ratio = found / expected
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)  # up to one common factor
    torch.testing.assert_close(found.log().mean(), torch.zeros((), dtype=torch.float64), atol=1e-5, rtol=0)


def test_with_full_migration_all_inputs_are_of_one_size(x, weights):
    scale = smoothquant.rescale(problem(x, weights, Grid(8, ROW), Grid(8, ROW), alpha=1.0))
    smoothed = (x / scale).abs().amax(0)
    torch.testing.assert_close(smoothed, smoothed[:1].expand_as(smoothed), rtol=1e-4, atol=0)


@pytest.mark.parametrize("inputs", [Grid(8, TENSOR), Grid(4, ROW), Grid(4, 32)])
@pytest.mark.parametrize("grid", [Grid(8, TENSOR), Grid(4, ROW), Grid(4, 32)])
def test_the_loss_is_that_of_rounded_weights_on_rounded_inputs(x, weights, grid, inputs):
    scale = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    found = loss(problem(x, weights, grid, inputs), scale)
    assert found == pytest.approx(textbook_loss(x, weights, scale, grid, inputs), rel=2e-2)


@pytest.mark.parametrize("inputs", [Grid(8, TENSOR), Grid(4, 32)])
def test_the_searched_strength_is_that_of_an_exhaustive_search(x, weights, inputs):
    """The oracle tries every strength, and none at all, with its own float64 rounding."""
    grid = Grid(inputs.bits, ROW)
    asked = problem(x, weights, grid, inputs)
    candidates = [torch.ones(64)]
    candidates += [smoothquant.smooth(asked.statistics, weights, step / 20) for step in range(21)]
    best = min(textbook_loss(x, weights, scale, grid, inputs) for scale in candidates)
    found = textbook_loss(x, weights, smoothquant.rescale(asked), grid, inputs)
    assert found <= 1.02 * best
    assert found < 0.5 * textbook_loss(x, weights, torch.ones(64), grid, inputs)  # it is worth it


def test_group_aware_scales_err_no_more_than_awq_s_or_smoothquant_s_alone(x, weights):
    asked = problem(x, weights, Grid(4, 32), Grid(4, 32))
    both = loss(asked, group_aware.rescale(asked))
    assert both <= loss(asked, torch.ones(64))
    assert both < 0.99 * loss(asked, smoothquant.rescale(replace(asked, weights=weights)))


def test_the_range_of_a_whole_tensor_is_what_calibration_saw(x):
    sums = Sums(64)
    for part in x.split(100):
        sums.add(part)
    statistics = sums.statistics()
    assert limits_of(statistics, Grid(8, TENSOR)) == Limits(x.min().item(), x.max().item())
    assert limits_of(statistics, Grid(8, ROW)) is None


def test_a_dead_channel_is_left_alone(x, weights):
    x[:, 5] = 0
    scale = smoothquant.rescale(problem(x, weights, Grid(8, ROW), Grid(8, ROW), alpha=0.5))
    assert scale[5] == 1
    assert torch.isfinite(scale).all()
