import pytest
import torch

from vlmq.exporter.methods import awq, rtn
from vlmq.exporter.methods.problem import Problem
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.scheme import Options, Scheme
from vlmq.exporter.statistics import output_loss
from vlmq.exporter.sums import Sums
from vlmq.kernels.grid import ROW, TENSOR, Grid, round_trip, to_grid

HALF = torch.float16


def problem(weights, statistics, grid, trial=None, **options):
    schemes = [Scheme("awq", grid, options=Options(**options)) for _ in weights]
    return Problem(weights, schemes, statistics, HALF, trial)


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
    sums = Sums(x.shape[1])
    for part in x.split(100):
        sums.add(part)
    return sums.statistics()


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


def as_awq_compares(scaled, x, grid):
    """A scaled weight rounded; at few bits each group in the range with which its own outputs of tokens x err least."""
    shrinks = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5) if grid.bits < 4 else (1.0,)
    found = torch.stack([round_trip(scaled, grid, HALF, shrink) for shrink in shrinks])
    width = grid.width(scaled.shape[1])
    errors = (found - scaled).double().unflatten(-1, (-1, width))
    grams = torch.einsum("tgc,tgd->gcd", *[x.double().unflatten(-1, (-1, width))] * 2)
    best = torch.einsum("srgc,gcd,srgd->srg", errors, grams, errors).argmin(0)  # (rows, groups)
    places = best[None, ..., None].expand(1, -1, -1, width)
    return found.unflatten(-1, (-1, width)).gather(0, places)[0].flatten(-2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scale_awq_chooses_is_that_of_an_exhaustive_search_on_the_outputs(inputs, weight, bits):
    """The oracle quantizes for each exponent and measures the outputs of real tokens in float64.

    At few bits it also clips each group to the range with which the group's own outputs err least.
    """
    grid = Grid(bits, 32)
    statistics = seen(inputs)

    def loss(exponent):
        scale = inputs.double().abs().mean(0) ** exponent
        scale = (scale / (scale.max() * scale.min()).sqrt()).float()
        quantized = as_awq_compares(weight * scale, inputs / scale, grid) / scale
        return (inputs.double() @ (quantized - weight).double().T).square().sum().item()

    best = min((step / 20 for step in range(20)), key=loss)
    found = awq.rescale(problem([weight], statistics, grid))
    torch.testing.assert_close(found, awq.candidate(statistics, best))
    assert best > 0  # fault 1: a search that always picks "no scaling"
    plain = (inputs.double() @ (round_trip(weight, grid, HALF) - weight).double().T).square().sum()
    assert loss(best) < 0.5 * plain
    assert loss(best) < 0.7 * loss(0)


def test_linears_that_read_one_input_share_the_scale_that_is_best_for_all(inputs, weight):
    statistics, grid = seen(inputs), Grid(3, 32)
    other = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))
    together = awq.rescale(problem([weight, other], statistics, grid))
    stacked = awq.rescale(problem([torch.cat([weight, other])], statistics, grid))
    assert torch.equal(together, stacked)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, ROW])
def test_clipping_lowers_every_group_s_own_error_or_leaves_it(inputs, weight, symmetric, group):
    statistics, grid = seen(inputs), Grid(3, group, symmetric)
    width = grid.width(64)
    plain, clipped = (method.solve(weight, statistics, Scheme("", grid), HALF).dequantize() for method in (rtn, awq))

    def group_losses(found):
        error = (found - weight).double().unflatten(1, (-1, width))
        x = inputs.double().unflatten(1, (-1, width))
        return torch.einsum("tgw,ogw->ogt", x, error).square().sum(-1)

    before, after = group_losses(plain), group_losses(clipped)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("method", METHODS)
def test_quantizing_stacked_rows_equals_quantizing_them_apart(method, inputs, weight):
    solve, scheme = METHODS[method].solve, Scheme(method, Grid(4, 32))
    statistics = seen(inputs)
    whole = solve(weight, statistics, scheme, HALF)
    for rows in (slice(0, 16), slice(16, 32), slice(32, 48)):
        part = solve(weight[rows], statistics, scheme, HALF)
        assert torch.equal(part.codes, whole.codes[rows])
        assert torch.equal(part.scale, whole.scale[rows])


def test_the_extremes_of_a_scale_are_each_other_s_inverse(inputs):
    """So a fold neither overflows nor underflows half precision, however large the inputs are."""
    scale = awq.candidate(seen(inputs * 1e4), 0.95)
    torch.testing.assert_close(scale.max() * scale.min(), torch.tensor(1.0))
    assert scale.max() > 2


def uniform(weight, bits):
    scheme = Scheme("uniform", Grid(bits, TENSOR, symmetric=False))
    return METHODS["uniform"].solve(weight, None, scheme, torch.float32)


def formula_of_paper_002(x, bits):
    """A.1 in float64, with the sign of max - min put right."""
    x, steps = x.double(), 2**bits - 1
    low, high = x.min(), x.max()
    return (high - low) * (((x - low) / (high - low) * steps).round() / steps) + low


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_is_the_formula_of_paper_002(weight, bits):
    """Exactly so where its offset is a whole number of steps; 0 must be a level, so else it moves by less than one."""
    step = (weight.max() - weight.min()) / (2**bits - 1)
    assert ((uniform(weight, bits).dequantize() - formula_of_paper_002(weight, bits)).abs() <= 1.001 * step).all()
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 2**bits, weight.shape, generator=generator).float() - (2**bits // 3)
    whole += (torch.rand(weight.shape, generator=generator) - 0.5) * 0.9
    whole[0, 0], whole[0, 1] = -(2**bits // 3), 2**bits - 1 - 2**bits // 3
    whole = whole.clamp(whole[0, 0].item(), whole[0, 1].item()) / 64
    torch.testing.assert_close(uniform(whole, bits).dequantize().double(), formula_of_paper_002(whole, bits))


def test_a_constant_tensor_is_kept_by_uniform():
    """The formula divides by max - min, which is 0 here."""
    constant = torch.full((4, 32), 0.75)
    torch.testing.assert_close(uniform(constant, 4).dequantize(), constant)
    assert (uniform(torch.zeros(4, 32), 4).dequantize() == 0).all()


def test_the_block_loss_chooses_by_the_trial_alone(inputs, weight):
    statistics, tried = seen(inputs), []

    def trial(scale):
        tried.append(scale)
        return -scale.max().item()

    found = awq.rescale(problem([weight], statistics, Grid(3, 32), trial, awq_loss="block"))
    assert len(tried) == len(awq.EXPONENTS)
    assert torch.equal(found, awq.candidate(statistics, 0.95))


def test_a_weighted_token_counts_as_often_as_its_weight_says(inputs):
    counts = torch.randint(1, 4, (len(inputs),), generator=torch.Generator().manual_seed(3))
    weighted, repeated = Sums(64), Sums(64)
    weighted.add(inputs, counts)
    repeated.add(inputs.repeat_interleave(counts, dim=0))
    torch.testing.assert_close(weighted.statistics().gram, repeated.statistics().gram, rtol=1e-4, atol=1e-2)


def test_what_the_reference_reads_is_kept_as_a_cross_gram(inputs):
    reference = inputs + torch.randn_like(inputs)
    found = Sums(64, cross=True)
    for part, other in zip(inputs.split(100), reference.split(100), strict=True):
        found.add(part, reference=other)
    exact = (reference.double() - inputs.double()).T @ inputs.double()
    torch.testing.assert_close(found.statistics().cross.double(), exact, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_clip_of_a_whole_tensor_is_one_for_all_rows(inputs, weight, symmetric):
    statistics, scheme = seen(inputs), Scheme("awq", Grid(3, TENSOR, symmetric))
    plain, clipped = (method.solve(weight, statistics, scheme, HALF) for method in (rtn, awq))
    assert (clipped.scale == clipped.scale[0, 0]).all()
    losses = [output_loss(found.dequantize() - weight, statistics.gram) for found in (plain, clipped)]
    assert losses[1] < losses[0]


@pytest.fixture
def wide():
    """Correlated rows of more columns than one block of a Gram matrix has."""
    x = torch.randn(300, 1100, generator=torch.Generator().manual_seed(0))
    x[:, 1:] += x[:, :-1].clone()
    return x


def test_a_gram_matrix_of_several_blocks_is_that_of_all_rows(wide):
    counts = torch.randint(1, 4, (len(wide),), generator=torch.Generator().manual_seed(3))
    found = Sums(1100)
    for part, weights in zip(wide.split(130), counts.split(130), strict=True):
        found.add(part, weights)
    exact = (wide.double() * counts.unsqueeze(1)).T @ wide.double()
    torch.testing.assert_close(found.statistics().gram.double(), exact, rtol=1e-5, atol=1e-2)


def test_the_loss_from_a_gram_matrix_of_several_blocks_is_the_squared_error_of_the_outputs(wide):
    errors = torch.randn(3, 5, 1100, generator=torch.Generator().manual_seed(1))
    direct = (wide.double() @ errors.double().mT).square().sum((-2, -1))
    torch.testing.assert_close(output_loss(errors, seen(wide).gram).double(), direct, rtol=1e-5, atol=0)


def test_a_gram_matrix_of_several_blocks_is_divided_like_its_input(wide):
    scale = torch.rand(1100, generator=torch.Generator().manual_seed(2)) + 0.5
    torch.testing.assert_close(seen(wide).divided_by(scale).gram, seen(wide / scale).gram, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("grid", [Grid(3, 32), Grid(4, ROW), Grid(4, TENSOR)])
def test_a_scale_that_was_left_before_its_last_rows_would_not_have_won(inputs, weight, grid, monkeypatch):
    """Weights of unlike sizes, so that a slab that held rows of one of them alone would mislead."""
    dice = torch.Generator().manual_seed(6)
    weights = [weight, torch.randn(700, 64, generator=dice) * 2, torch.randn(33, 64, generator=dice) * 9]
    asked = problem(weights, seen(inputs), grid)
    looked, row_losses = [], awq.row_losses

    def total(exponent):
        scale = awq.candidate(asked.statistics, exponent)
        errors = [as_awq_compares(weight * scale, inputs / scale, grid) / scale - weight for weight in weights]
        return sum((inputs.double() @ error.double().T).square().sum().item() for error in errors)

    def counted(error, gram):
        if error.ndim == 2:  # whole rows; of single groups it asks about their ranges
            looked.append(len(error))
        return row_losses(error, gram)

    monkeypatch.setattr(awq, "row_losses", counted)
    monkeypatch.setattr(awq, "SLAB", 64)
    best = min((step / 20 for step in range(20)), key=total)
    assert torch.equal(awq.rescale(asked), awq.candidate(asked.statistics, best))
    assert sum(looked) < 0.6 * 20 * 781 or grid.group == TENSOR  # some were left
