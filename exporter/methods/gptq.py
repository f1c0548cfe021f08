"""GPTQ: columns rounded one by one, each one's error made good by those that follow (Frantar et al., arXiv 2210.17323).

Section 3, eq. 2 and 3, and Algorithm 1, which needs the inverse of H = sum w x x^T + damp * mean(diag H) I and a factor
of that. Here H itself is factored, H = R R^T with R upper, which is half of the work: the error ||Q x - W x||^2 is the
sum over rows of ||(q - w) R||^2, of which column k is

    (q_k - w_k) R_kk + sum over j < k of (q_j - w_j) R_jk

so that after columns j < k are rounded, column k errs least where it is rounded from

    w_k + sum over j < k of (w_j - q_j) R_jk / R_kk

which is where the paper has moved it to by then. Columns come in order or by falling diag H (act_order). The columns
beyond a block of 128 are moved once a block (section 3, step 2).

Ranges fitted beforehand are those with which rounding to nearest errs least (option `clip`; the paper takes each
group's extremes): on correlated inputs that halves what is left of the error at 2 and 3 bits.

`gptaq`, asymmetric calibration (Li et al., arXiv 2504.02692, Algorithm 1), aims at ||Q x - W r||^2, where r is what
the full-precision model reads in place of x. The part of W (r - x) that column j answers for, w_j (r_j - x_j), is left
to the columns k > j, whose least squares have the inverse U_k>j^T U_k>j, U = R^-1. They also move by

    +w_j * P_jk,    P = striu(C U^T) U,    C = sum w (r - x) x^T

where striu keeps what is above the diagonal. Here w_j is the weight as moved so far, and P is not damped by a factor;
what is moved so counts as the weight that was given.
"""

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

from vlmq.exporter.devices import CPU
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.methods import awq
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.statistics import Statistics
from vlmq.kernels.grid import ROW, TENSOR, Grid, QuantizedWeight, fit, float_codes

BLOCK = 128  # columns rounded before the columns beyond them are moved
STRIP = 16  # columns rounded before the others of their block are moved; every group is a multiple of it
SLAB = 256  # rows in one matrix product: its shape, and so its rounding, is the same for every row
STACK = 2**24  # values that go through the column loop together: bounds what is needed beside the weight
ON_GPU = 2**26  # on a GPU, where a column takes as long however many rows it has
STRIPE = 64  # columns that a factor is put in order or scaled by: bounds what is needed beside it
ATTEMPTS = 4  # at factoring the Gram matrix, each damped ten times as much as the one before


def solve(weight: Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """weight (out, in) float32  ->  its codes in the order of its columns, scales in `dtype`.

    Every row is solved as if it were alone, bit for bit (but for the scale that a TENSOR grid shares).
    ValueError: act_order where groups are fitted on the way, gptaq without `statistics.cross`.
    VlmqError: a Gram matrix that cannot be factored.
    """
    grid, options = scheme.grid, scheme.options
    static = options.static_groups or grid.group in (ROW, TENSOR)
    if options.act_order and not static:
        raise ValueError("act_order tears apart groups that are fitted on the way; it needs static_groups")
    inputs = statistics.gram.diagonal()
    order = inputs.argsort(descending=True, stable=True) if options.act_order else torch.arange(len(inputs))
    moves = _moves(statistics, order.to(weight.device), options.damp, options.gptaq)  # first: it needs the most memory
    dead = inputs == 0
    shared = _fit(weight.masked_fill(dead, 0), statistics, scheme, dtype) if grid.group == TENSOR else None
    parts = []
    together = STACK if weight.device == CPU else ON_GPU
    for rows in weight.split(max(SLAB, together // len(inputs) // SLAB * SLAB)):
        stack = pad(rows.masked_fill(dead, 0), (0, 0, 0, -len(rows) % SLAB))  # rows of zeros fill up the last slab
        if shared:
            scale, zero = (each[:, :1].repeat(1, len(stack)) for each in shared)
        elif static:
            scale, zero = _fit(stack, statistics, scheme, dtype)
        else:
            scale = stack.new_empty(len(inputs) // grid.width(len(inputs)), len(stack), dtype=dtype)
            zero = torch.empty_like(scale, dtype=torch.uint8)
        codes = _round_columns(stack.T[order].contiguous(), order.cpu().tolist(), moves, scale, zero, grid, static)
        parts.append([found.T[: len(rows)] for found in (codes, scale, zero)])
    codes, scale, zero = (torch.cat(found) for found in zip(*parts, strict=True))
    return QuantizedWeight(codes, scale, zero, grid)


def _fit(weight: Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each group's scale and zero, known before any column is rounded: weight (out, in)  ->  both (groups, out)."""
    shrink = _shrink(weight, statistics, scheme.grid, dtype) if scheme.options.clip else 1.0
    scale, zero = fit(weight, scheme.grid, dtype, shrink)
    return scale.T.contiguous(), zero.T.contiguous()


def _shrink(weight: Tensor, statistics: Statistics, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The factor of each group's range (out, groups) with which rounding to nearest errs least, as AWQ clips."""
    slabs = (weight,) if grid.group == TENSOR else weight.split(SLAB)
    return torch.cat([awq.clip(slab, statistics, grid, dtype) for slab in slabs])


def _moves(statistics: Statistics, order: Tensor, damp: float, asymmetric: bool) -> list[Tensor]:
    """How a rounded column moves those that follow, each (in, in) float32, columns in `order`.

    First by its error, R_jk / R_kk, then, if asymmetric, by its value.
    """
    if asymmetric and statistics.cross is None:
        raise ValueError("gptaq needs what the full-precision model reads; statistics.cross is missing")
    factor = upper_factor(statistics.gram, damp, order)
    by_value = []
    if asymmetric and statistics.cross is not None:
        cross = statistics.cross[order][:, order].double()
        given = solve_triangular(factor.T, cross, upper=False, left=False).triu_(1)
        by_value.append(solve_triangular(factor, given, upper=True, left=False).float())
    return [_by_error(factor), *by_value]


def _by_error(factor: Tensor) -> Tensor:
    """R_jk / R_kk in float32, written over R, whose columns lie side by side: half of its memory is then idle."""
    size, diagonal = len(factor), factor.diagonal().clone()
    columns = factor.mT
    moves = columns.view(torch.float32).flatten()[: size * size].view(size, size)
    for panel in _panels(size, STRIPE):  # never ahead of what is read: a column is half as long as it was
        moves[panel] = columns[panel] / diagonal[panel].unsqueeze(1)
    return moves.mT


def upper_factor(gram: Tensor, damp: float, order: Tensor) -> Tensor:
    """R, upper triangular, with R R^T the damped Gram matrix: (in, in)  ->  (in, in) float64, columns side by side.

    Rows and columns are put in `order` (in,) first. A channel that is always 0 gets diagonal 1.
    """
    backwards = order.flip(0)  # a lower factor read backwards is upper
    inputs = gram.diagonal()[backwards]
    share = damp * inputs.double().mean()
    # At 11008 columns it is 1 GB, so there is one such matrix; LAPACK works in place on columns that lie side by side.
    factor = torch.empty_like(gram, dtype=torch.float64, memory_format=torch.contiguous_format).mT
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    for attempt in range(ATTEMPTS):
        for panel in _panels(len(gram), STRIPE):
            factor[:, panel] = gram[backwards[panel]][:, backwards].T
        factor.diagonal().add_(share * 10**attempt).masked_fill_(inputs == 0, 1)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            _turn(factor)
            return factor
    raise VlmqError(
        f"the Gram matrix of an input cannot be factored, not even with damp={damp * 10 ** (ATTEMPTS - 1):g}; "
        "calibrate with more samples or --option damp=0.1"
    )


def _turn(matrix: Tensor) -> None:
    """Reverse the rows and the columns of a square matrix whose columns lie side by side, in place."""
    columns = matrix.mT
    for panel in _panels(len(matrix) // 2, STRIPE):
        mirror = slice(len(matrix) - panel.stop, len(matrix) - panel.start)
        front = columns[panel].flip(0, 1)
        columns[panel] = columns[mirror].flip(0, 1)
        columns[mirror] = front
    if len(matrix) % 2:
        columns[len(matrix) // 2] = columns[len(matrix) // 2].flip(0)


def _panels(stop: int, width: int) -> list[slice]:
    return [slice(first, min(first + width, stop)) for first in range(0, stop, width)]


def _round_columns(
    weight: Tensor,
    order: list[int],
    moves: list[Tensor],
    scale: Tensor,
    zero: Tensor,
    grid: Grid,
    static: bool,
) -> Tensor:
    """The column loop. weight (in, out), in place, its columns (rows here) in `order`  ->  codes (in, out) uint8.

    scale, zero (groups, out) are of the original order; if not static, they are filled when a group is reached.
    A column is a row here, since its values then lie side by side.
    """
    codes = torch.empty_like(weight, dtype=torch.uint8)
    errors = weight.clone()  # of a rounded column what it lost of the weight given; of the others that weight
    by_error = moves[0]
    width = grid.width(len(weight))
    steps, offsets = scale.float(), zero.float()
    # A group that is fitted on the way lies in one block, whose columns are up to date where a group begins.
    block = BLOCK if static else max(width, BLOCK - BLOCK % width)
    for start in range(0, len(weight), block):
        stop = min(start + block, len(weight))
        for first in range(start, stop, STRIP):
            last = min(first + STRIP, stop)
            for column in range(first, last):
                group = order[column] // width
                if not static and column % width == 0:
                    best = _best(weight, errors, by_error, slice(column, column + width))
                    scale[group], zero[group] = (fitted.squeeze(1) for fitted in fit(best.T, grid, scale.dtype))
                    steps[group], offsets[group] = scale[group], zero[group]
                code = float_codes(weight[column], steps[group], offsets[group], grid)
                codes[order[column]] = code
                errors[column] -= code.sub_(offsets[group]).mul_(steps[group])
                ahead = slice(column + 1, last)
                weight[ahead] += by_error[column, ahead].unsqueeze(1) * errors[column]
                for by_value in moves[1:]:
                    moved = by_value[column, ahead].unsqueeze(1) * weight[column]
                    weight[ahead] += moved
                    errors[ahead] += moved
            _move(weight, errors, moves, slice(first, last), slice(last, stop))
        _move(weight, errors, moves, slice(start, stop), slice(stop, len(weight)))
    return codes


def _best(weight: Tensor, errors: Tensor, by_error: Tensor, group: slice) -> Tensor:
    """The columns of a group (width, out) that err least if none of them is rounded: what its range is fitted to.

    Each is what it is moved to by all before it, those of the group included, which are not rounded yet: with d the
    differences from the weight given, d_k + sum over j < k in the group of d_j R_jk / R_kk is what `weight` has.
    """
    given = errors[group]
    behind = solve_triangular(by_error[group, group].T, weight[group] - given, upper=False, unitriangular=True)
    return given + behind


def _move(weight: Tensor, errors: Tensor, moves: list[Tensor], done: slice, ahead: slice) -> None:
    """Move the columns `ahead` by what the columns `done` left: weight, errors (in, out), in place.

    In slabs of rows: how a matrix product rounds depends on its shape, not on where a row lies in it.
    """
    by_error, *by_value = (move[done, ahead].T for move in moves)
    for first in range(0, weight.shape[1] if len(by_error) else 0, SLAB):
        slab = slice(first, first + SLAB)
        weight[ahead, slab].addmm_(by_error, errors[done, slab])
        for move in by_value:
            moved = move @ weight[done, slab]
            weight[ahead, slab] += moved
            errors[ahead, slab] += moved
