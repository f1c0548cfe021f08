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
from vlmq.exporter.walk import Block, Input

ROUNDING = 2  # float32 copies of a stack: itself, and its codes with a few rows on their way to them
LOSS = 3  # float32 copies of a weight: its error, that times the Gram matrix, and their product
CLIPPING = 8  # of the rows clipped at once: as with LOSS, and what the allocator keeps of them; measured
FACTORING = 13  # bytes for each entry of a Gram matrix: the factor in float64, the moves in float32; measured
COLUMNS = 4.25  # copies of a stack in gptq's column loop: it, without dead channels, turned, its errors; codes


def to_choose_codes(rows: int, columns: int, solve: Callable[..., Any], options: Options) -> int:
    """Bytes while `solve`, of the registry of methods, chooses the codes of a stack (rows, columns)."""
    return SOLVING[solve](rows, columns, options)


def _rounding(rows: int, columns: int, options: Options) -> int:
    return ROUNDING * rows * columns * FLOAT


def _clipping(rows: int, columns: int, options: Options) -> int:
    return _rounding(rows, columns, options) + CLIPPING * min(rows, awq.ROWS) * columns * FLOAT


def _compensating(rows: int, columns: int, options: Options) -> int:
    stack, matrix = rows * columns * FLOAT, columns * columns
    moves = 2 if options.gptaq else 1
    factoring = stack + (FACTORING + (moves - 1) * FLOAT) * matrix
    return max(factoring, int(COLUMNS * stack) + moves * matrix * FLOAT)


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
    searching = (sum(rows) + LOSS * min(max(rows), awq.SLAB)) * columns * FLOAT
    return max(searching, 2 * columns * columns * FLOAT)  # the divisors of the Gram matrix, and the quotient


def to_solve(entry: Input, work: Workload) -> int:
    """Bytes while the codes of the linears that read an input are chosen, and their error measured."""
    stacks: dict[Any, int] = {}
    for site, scheme in work.quantized(entry):
        rows = sum(part.stop - part.start for part in scheme.rows) if scheme.rows else site.rows
        key = (METHODS[scheme.method].solve, scheme.grid, scheme.options)
        stacks[key] = stacks.get(key, 0) + rows
    columns = entry.sites[0].columns
    solving = (to_choose_codes(rows, columns, solve, options) for (solve, _, options), rows in stacks.items())
    measuring = LOSS * max((site.rows for site, _ in work.quantized(entry)), default=0) * columns * FLOAT
    return max([measuring if work.samples else 0, *solving])


def to_work(block: Block, work: Workload) -> int:
    """Bytes of the working copies of a block's methods, at the most: they work on one input after the other."""
    return max(max(to_rescale(entry, work), to_solve(entry, work)) for entry in block.inputs)
