"""GPTQ against Optimal Brain Surgeon in float64, which updates an explicit inverse and knows no Cholesky factor."""

import pytest
import torch
from elsewhere import a_device_elsewhere
from torch.utils._python_dispatch import TorchDispatchMode

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.methods import awq, gptq
from vlmq.exporter.scheme import Options, Scheme
from vlmq.exporter.sums import Sums
from vlmq.kernels.grid import ROW, TENSOR, Grid, to_grid

HALF = torch.float16
COLUMNS = 160  # more than one block


@pytest.fixture
def x():
    return correlated(tokens=700, columns=COLUMNS)


@pytest.fixture
def r(x):
    """What the full-precision model reads: the input, and some of each channel in others."""
    return x @ (torch.eye(COLUMNS) + 0.3 * normal(COLUMNS, COLUMNS, seed=3) / COLUMNS**0.5)


@pytest.fixture
def weight():
    return normal(512, COLUMNS, seed=1)  # so many that one code, rounded otherwise at a tie, would hardly be seen


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens, columns):
    """Channels that mix with one another, a few much larger than the rest."""
    x = normal(tokens, columns, seed=0) @ (torch.eye(columns) + normal(columns, columns, seed=2) / columns**0.5)
    x[:, [3, 17, 40]] *= 8
    return x


def seen(x, r=None):
    sums = Sums(x.shape[1], cross=r is not None)
    sums.add(x, reference=r)
    return sums.statistics()


def solve(weight, statistics, grid, dtype=HALF, clip=False, **options):
    """With the extremes of each group for its range, as the paper has it, unless asked otherwise."""
    return gptq.solve(weight, statistics, Scheme("gptq", grid, options=Options(clip=clip, **options)), dtype)


def loss(found, weight, x, r=None):
    """sum over tokens of ||Q x - W r||^2, from the tokens themselves."""
    outputs = x.double() @ found.double().T
    return (outputs - (x if r is None else r).double() @ weight.double().T).square().sum().item()


def levels_of(weight, grid):
    """Min-max scale and zero of each row of weight (out, width), as (out,) float64."""
    low, high = weight.amin(1), weight.amax(1)
    if grid.group == TENSOR:
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    if grid.symmetric:
        scale = torch.maximum(-low, high) / (grid.levels // 2 - 1)
        return scale.to(HALF).double(), torch.full_like(scale, grid.levels // 2)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (grid.levels - 1)).to(HALF).double()
    return scale, (-low / scale).round().clamp(0, grid.levels - 1)


def textbook(weight, statistics, grid, act_order, static_groups, gptaq=False, damp=0.01, clip=None):
    """Optimal Brain Surgeon, a column at a time: Q (out, in) float64.

    A rounded column is struck out of the inverse by a step of Gaussian elimination (arXiv 2208.11580, eq. 3).
    With gptaq, the part of the reference's output that is this column's and that the input lacks is given to the
    columns left, by solving their normal equations afresh.
    """
    gram = statistics.gram.double()
    damped = gram + damp * gram.diagonal().mean() * torch.eye(len(gram))
    inverse = torch.linalg.inv(damped)
    weight, found = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    width = grid.width(len(gram))
    fitted = {start: levels_of(weight[:, start : start + width], grid) for start in range(0, len(gram), width)}
    if clip is not None:  # of symmetric grids: the range is a share of what it was
        fitted = {
            start: ((scale * clip[:, start // width]).to(HALF).double(), zero)
            for start, (scale, zero) in fitted.items()
        }
    order = gram.diagonal().argsort(descending=True) if act_order else torch.arange(len(gram))
    for step, column in enumerate(order.tolist()):
        group = column // width * width
        if not static_groups and column == group and grid.group not in (ROW, TENSOR):
            fitted[group] = levels_of(weight[:, group : group + width], grid)
        scale, zero = fitted[group]
        value = weight[:, column].clone()
        found[:, column] = (((value / scale).round() + zero).clamp(0, grid.levels - 1) - zero) * scale
        weight -= torch.outer((value - found[:, column]) / inverse[column, column], inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        left = order[step + 1 :]
        if gptaq and len(left):
            owed = torch.outer(value, statistics.cross.double()[column, left])
            weight[:, left] += torch.linalg.solve(damped[left][:, left], owed.T).T
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 80, ROW, TENSOR])
@pytest.mark.parametrize(("act_order", "static_groups"), [(True, True), (False, True), (False, False)])
def test_the_loss_of_a_linear_is_the_textbook_s(x, weight, bits, symmetric, group, act_order, static_groups):
    """Also the fault of a public GPTQ whose errors reach the wrong columns (`k : k + j`)."""
    grid, statistics = Grid(bits, group, symmetric), seen(x)
    found = solve(weight, statistics, grid, act_order=act_order, static_groups=static_groups).dequantize()
    expected = loss(textbook(weight, statistics, grid, act_order, static_groups), weight, x)
    assert loss(found, weight, x) == pytest.approx(expected, rel=1e-4)
    assert expected < 0.95 * loss(to_grid(weight, grid, HALF).dequantize(), weight, x)


@pytest.mark.parametrize(
    ("group", "act_order", "static_groups"), [(32, True, True), (32, False, False), (TENSOR, True, True)]
)
@pytest.mark.parametrize("gptaq", [False, True])
def test_rows_that_do_not_fit_into_one_stack_become_the_same(x, group, act_order, static_groups, gptaq, monkeypatch):
    weight, statistics = normal(700, x.shape[1], seed=1), seen(x, x + normal(*x.shape, seed=7))
    options = {"act_order": act_order, "static_groups": static_groups, "gptaq": gptaq, "clip": True}
    whole = solve(weight, statistics, Grid(3, group), **options)
    monkeypatch.setattr(gptq, "STACK", 300 * x.shape[1])
    parts = solve(weight, statistics, Grid(3, group), **options)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name


class Counted(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [gptq, awq])
def test_on_a_gpu_twice_the_rows_are_hardly_more_operations(x, weight, method):
    """For each is a launch, which takes longer than its arithmetic does."""

    def operations(rows, device):
        sums = Sums(x.shape[1], device)
        sums.add(x.to(device))
        given, scheme, counted = weight[:rows].to(device), Scheme("it", Grid(3, 32), options=Options()), Counted()
        with counted:
            found = method.solve(given, sums.statistics(), scheme, HALF)
        return counted.count, found.to(torch.device("cpu")).codes

    _, here = operations(512, torch.device("cpu"))
    with a_device_elsewhere() as device:
        few, _ = operations(256, device)
        many, there = operations(512, device)
    assert few <= many < 1.2 * few
    assert (there != here).float().mean() < 0.01


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ranges_that_are_clipped_as_awq_clips_them_err_less(x, weight, bits):
    grid, statistics = Grid(bits, 32), seen(x)
    found = loss(solve(weight, statistics, grid, clip=True).dequantize(), weight, x)
    factors = awq.clip(weight, statistics, grid, HALF).double()
    expected = loss(textbook(weight, statistics, grid, True, True, clip=factors), weight, x)
    assert found == pytest.approx(expected, rel=2e-2)  # a range is rounded to half precision once here, twice there
    assert found < 0.9 * loss(solve(weight, statistics, grid).dequantize(), weight, x)


@pytest.mark.parametrize(("group", "columns"), [(48, 192), (112, 224), (256, 512)])
def test_groups_that_no_block_divides_are_fitted_on_columns_that_are_up_to_date(group, columns):
    x, weight = correlated(1000, columns), normal(32, columns, seed=1)
    grid, statistics = Grid(3, group, symmetric=False), seen(x)
    found = solve(weight, statistics, grid, act_order=False, static_groups=False).dequantize()
    expected = textbook(weight, statistics, grid, act_order=False, static_groups=False)
    assert loss(found, weight, x) == pytest.approx(loss(expected, weight, x), rel=1e-4)


def test_codes_are_in_the_order_of_the_columns_whatever_the_order_they_were_solved_in(x, weight):
    grid = Grid(8, 32)
    for act_order in (True, False):
        found = solve(weight, seen(x), grid, act_order=act_order)
        assert (found.dequantize() - weight).abs().max() < 0.1 * weight.std()


@pytest.mark.parametrize("group", [32, ROW, TENSOR])
def test_inputs_without_correlation_are_rounded_to_nearest(weight, group):
    grid = Grid(3, group, symmetric=False)
    statistics = seen(torch.diag(torch.rand(COLUMNS) + 0.5))
    found, nearest = solve(weight, statistics, grid), to_grid(weight, grid, HALF)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.scale, nearest.scale)
    assert torch.equal(found.zero, nearest.zero)


@pytest.mark.parametrize("act_order", [True, False])
def test_a_column_that_is_never_fed_gets_weight_0_and_changes_nothing_else(x, weight, act_order):
    x[:, [5, 90]] = 0
    grid, without = Grid(3, 32), weight.clone()
    without[:, [5, 90]] = 0
    weight[:, 90] = 50  # would widen the range of its group
    found = solve(weight, seen(x), grid, act_order=act_order).dequantize()
    assert (found[:, [5, 90]] == 0).all()
    expected = textbook(without, seen(x), grid, act_order, static_groups=True)
    assert loss(found, without, x) == pytest.approx(loss(expected, without, x), rel=1e-4)


def test_a_linear_that_is_never_fed_is_all_zeros(weight):
    assert (solve(weight, seen(torch.zeros(4, COLUMNS)), Grid(4, 32)).dequantize() == 0).all()


@pytest.mark.parametrize("damp", [0.01, 1e-9])
def test_fewer_tokens_than_columns_are_solved(x, weight, damp):
    few, grid = x[:20], Grid(3, 32)
    found = solve(weight, seen(few), grid, damp=damp).dequantize()
    assert loss(found, weight, few) < 0.3 * loss(to_grid(weight, grid, HALF).dequantize(), weight, few)


def test_a_gram_matrix_that_cannot_be_factored_is_damped_more_and_more_then_refused_in_one_line(x, weight):
    statistics = seen(x[:20])
    statistics.gram.diagonal().sub_(1e-5 * statistics.gram.diagonal().mean())  # eigenvalues below 0
    solve(weight, statistics, Grid(4, 32), damp=1e-7)
    with pytest.raises(VlmqError, match=r"^[^\n]*cannot be factored[^\n]*--option damp=0.1$"):
        solve(weight, statistics, Grid(4, 32), damp=1e-9)


@pytest.mark.parametrize("gptaq", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("cuts", [[1, 300], [2, 3, 5, 291], [7, 64, 230], [100, 101, 100]])
def test_solving_stacked_rows_equals_solving_them_apart_bit_for_bit(x, r, static_groups, gptaq, cuts):
    """Scales in float32, fitted on the way, show the last bit of every weight that was moved; codes would not."""
    options = {"act_order": static_groups, "static_groups": static_groups, "gptaq": gptaq, "dtype": torch.float32}
    stacked, grid, statistics = normal(301, COLUMNS, seed=4), Grid(3, 32, symmetric=False), seen(x, r)
    whole = solve(stacked, statistics, grid, **options)
    parts = [solve(part, statistics, grid, **options) for part in stacked.split(cuts)]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    assert torch.equal(torch.cat([part.scale for part in parts]), whole.scale)
    assert torch.equal(torch.cat([part.zero for part in parts]), whole.zero)


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.98), (4, 0.8)])
@pytest.mark.parametrize(("act_order", "static_groups"), [(True, True), (False, True), (False, False)])
def test_asymmetric_calibration_is_the_textbook_s_and_nearer_to_the_reference(
    x, r, weight, bits, gain, act_order, static_groups
):
    grid, statistics = Grid(bits, 32, symmetric=False), seen(x, r)
    options = {"act_order": act_order, "static_groups": static_groups}
    found = solve(weight, statistics, grid, gptaq=True, **options).dequantize()
    expected = loss(textbook(weight, statistics, grid, act_order, static_groups, gptaq=True), weight, x, r)
    assert loss(found, weight, x, r) == pytest.approx(expected, rel=1e-4)
    assert expected < gain * loss(solve(weight, statistics, grid, **options).dequantize(), weight, x, r)


def test_asymmetric_calibration_on_inputs_that_are_the_reference_s_changes_nothing(x, weight):
    grid, statistics = Grid(3, 32), seen(x, x)
    plain, asymmetric = (solve(weight, statistics, grid, gptaq=gptaq) for gptaq in (False, True))
    assert torch.equal(plain.codes, asymmetric.codes)
    assert torch.equal(plain.scale, asymmetric.scale)


def test_what_cannot_be_solved_is_refused(x, weight):
    with pytest.raises(ValueError, match="static_groups"):
        solve(weight, seen(x), Grid(4, 32), act_order=True, static_groups=False)
    with pytest.raises(ValueError, match="cross"):
        solve(weight, seen(x), Grid(4, 32), gptaq=True)
    solve(weight, seen(x), Grid(4, ROW), act_order=True, static_groups=False)  # a row is one group, fitted beforehand


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS - 1, 47])
def test_the_factor_found_in_place_is_that_of_the_inverse(columns):
    """R = U^-1 where U^T U is the inverse, whatever the order."""
    x = correlated(700, columns)
    gram, order = seen(x).gram, torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    factor = gptq.upper_factor(gram, 0.01, order)
    damped = gram.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    expected = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    torch.testing.assert_close(torch.linalg.inv(factor), expected, rtol=1e-8, atol=1e-12)
