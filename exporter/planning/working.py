"""What the methods hold besides a block and its statistics while they choose scales and codes.

A *stack* is the rows that are solved together: of the linears that read one input and have one scheme. Counts of copies
were read in the methods' code, and measured where it says so.
"""

from collections.abc import Callable
from typing import Any

from vlmq.exporter.methods import awq, gptq, rtn
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.planning.workload import FLOAT, Workload
from vlmq.exporter.scheme import Options
from vlmq.exporter.walk import Input
from vlmq.kernels.grid import ROWS

ROUNDING = 1  # float32 copies of a stack: its codes, twice while they are put together, and a few rows on their way
LOSS = 3  # float32 copies of some rows: their error, that times the Gram matrix, and their product
CLIPPING = 8  # of the rows clipped at once: as with LOSS, and what the allocator keeps of them; measured
FACTORING = 9  # bytes for each entry of a Gram matrix: its factor in float64, and panels of it; measured
COLUMNS = 4.25  # copies of what goes through gptq's column loop: it, padded, turned, its errors; codes


def to_choose_codes(rows: int, columns: int, solve: Callable[..., Any], options: Options) -> int:
    """Bytes while `solve`, of the registry of methods, chooses the codes of a stack (rows, columns)."""
    return SOLVING[solve](rows, columns, options)


def _rounding(rows: int, columns: int, options: Options) -> int:
    return ROUNDING * rows * columns * FLOAT


def _clipping(rows: int, columns: int, options: Options) -> int:
    return _rounding(rows, columns, options) + CLIPPING * min(rows, ROWS) * columns * FLOAT


def _compensating(rows: int, columns: int, options: Options) -> int:
    matrix, together = columns * columns, min(rows * columns, max(gptq.STACK, gptq.SLAB * columns))
    by_value = FLOAT * matrix if options.gptaq else 0  # the other moves; to make them, three matrices in float64
    looping = 2 * FLOAT * matrix + by_value + int(COLUMNS * FLOAT * together) + rows * columns
    return max(FACTORING * matrix + 6 * by_value, looping)


SOLVING: dict[Callable[..., Any], Callable[[int, int, Options], int]] = {
    rtn.solve: _rounding,
    awq.solve: _clipping,
    gptq.solve: _compensating,
}


def to_rescale(entry: Input, work: Workload) -> int:
    """Bytes while a scale is searched for an input, then its statistics divided by it; 0 where none is."""
    asked = [site for site, scheme in work.quantized(entry) if METHODS[scheme.method].rescale]
    if entry.source is None or not asked or not work.samples:
        return 0
    columns = entry.sites[0].columns
    rows = [site.rows for site, _ in work.quantized(entry)]
    joined = [site.rows for site, scheme in work.quantized(entry) if scheme.rows and len(scheme.rows) > 1]
    searching = (sum(joined) + LOSS * min(max(rows), awq.SLAB)) * columns * FLOAT
    return max(searching, columns * columns * FLOAT)  # the Gram matrix divided by it


def to_solve(entry: Input, work: Workload) -> int:
    """Bytes while the codes of the linears that read an input are chosen."""
    stacks: dict[Any, list[int]] = {}
    for site, scheme in work.quantized(entry):
        rows = sum(part.stop - part.start for part in scheme.rows) if scheme.rows else site.rows
        stacks.setdefault((METHODS[scheme.method].solve, scheme.grid, scheme.options), []).append(rows)
    columns = entry.sites[0].columns

    def held(rows: list[int], solve: Callable[..., Any], options: Options) -> int:
        stacked = sum(rows) * columns * FLOAT if len(rows) > 1 else 0
        return stacked + to_choose_codes(sum(rows), columns, solve, options)

    return max((held(rows, solve, options) for (solve, _, options), rows in stacks.items()), default=0)
