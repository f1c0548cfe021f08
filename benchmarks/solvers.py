"""What a method costs at the shapes of real models: seconds, memory beside its problem, and how far from the bound.

    python benchmarks/solvers.py [--problem llama.down ...] [--step scale clip gptq] [--rows 1]

A problem is the linears that read one input of a block, stacked, with a Gram matrix of random correlated tokens. The
bound is what the products that no way around is known of would take at the rate that this machine has for a product
of two 2048 x 2048 matrices: for sums over the Gram matrix half of it, since it is symmetric.

| step     | what it does                                     | operations that bound it (out, in, group of 128)      |
|----------|--------------------------------------------------|-------------------------------------------------------|
| gram     | the statistics of 2048 tokens                    | tokens in^2                                           |
| rtn      | round to nearest                                 | none: it is limited by memory                         |
| scale    | AWQ's search for a scale, 20 candidates          | 20 out in^2                                           |
| clip     | AWQ's search for ranges, and the codes           | 11 * 2 out in 128                                     |
| gptq     | GPTQ, ordered by activation, with clipped ranges | out in^2, in^3 / 3 in float64, and those of clip      |
| loss     | the error that a site is reported with           | 2 out in^2                                            |
"""

import argparse
import json
import time
from collections.abc import Callable
from multiprocessing import get_context

import common
import torch
from torch import Tensor

from vlmq.exporter.evaluation import memory
from vlmq.exporter.methods import awq, gptq, rtn
from vlmq.exporter.methods.problem import Problem
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.statistics import Statistics, output_loss
from vlmq.exporter.sums import Sums
from vlmq.kernels.grid import Grid, to_grid

PROBLEMS = {  # rows of the stacked linears, columns
    "llama.qkv": (3 * 4096, 4096),
    "llama.gate_up": (2 * 11008, 4096),
    "llama.down": (4096, 11008),
    "vit.qkv": (3 * 1408, 1408),
    "vit.fc1": (6144, 1408),
    "vit.fc2": (1408, 6144),
    "opt.qkv": (3 * 2560, 2560),
    "opt.fc1": (10240, 2560),
    "opt.fc2": (2560, 10240),
}
GRID = Grid(4, 128)
TOKENS = 2048
HALF = torch.float16
SIDE = 2048  # of the matrices whose product tells the machine's rate

Work = Callable[[Tensor, Statistics], object]
STEPS: dict[str, tuple[Work, Callable[[int, int], tuple[float, float]]]] = {  # operations in float32, in float64
    "gram": (
        lambda weight, seen: summed(weight.shape[1]),
        lambda rows, columns: (TOKENS * columns**2, 0),
    ),
    "rtn": (
        lambda weight, seen: rtn.solve(weight, seen, Scheme("rtn", GRID), HALF),
        lambda rows, columns: (0, 0),
    ),
    "scale": (
        lambda weight, seen: awq.rescale(Problem([weight], [Scheme("awq", GRID)], seen, HALF, lambda scale: 0.0)),
        lambda rows, columns: (len(awq.EXPONENTS) * rows * columns**2, 0),
    ),
    "clip": (
        lambda weight, seen: awq.solve(weight, seen, Scheme("awq", GRID), HALF),
        lambda rows, columns: (len(awq.SHRINKS) * 2 * rows * columns * GRID.group, 0),
    ),
    "gptq": (
        lambda weight, seen: gptq.solve(weight, seen, Scheme("gptq", GRID), HALF),
        lambda rows, columns: (
            rows * columns**2 + len(awq.SHRINKS) * 2 * rows * columns * GRID.group,
            columns**3 / 3,
        ),
    ),
    "loss": (
        lambda weight, seen: (
            output_loss(to_grid(weight, GRID).dequantize() - weight, seen.gram),
            output_loss(weight, seen.gram),
        ),
        lambda rows, columns: (2 * rows * columns**2, 0),
    ),
}


def tokens(columns: int) -> Tensor:
    """Inputs (TOKENS, columns): channels of different sizes that are correlated with their neighbours."""
    drawn = torch.randn(TOKENS, columns, generator=torch.Generator().manual_seed(1))
    drawn[:, 1:] += 0.5 * drawn[:, :-1]
    return drawn * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(2))]


def summed(columns: int) -> Statistics:
    sums = Sums(columns)
    sums.add(tokens(columns))
    return sums.statistics()


def measure(step: str, rows: int, columns: int, rates: dict[str, float]) -> dict[str, float]:
    """One step on one problem: seconds, the peak of memory beyond the problem's, and the bound's share."""
    work, operations = STEPS[step]
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * columns**-0.5
    seen = summed(columns)
    memory.forget_peak()
    before, start, cpu = memory.resident(), time.perf_counter(), time.process_time()
    work(weight, seen)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    single, double = operations(rows, columns)
    bound = single / rates["float32"] + double / rates["float64"]
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "temporary_bytes": memory.peak() - before,
        "bound_seconds": round(bound, 2),
        "share_of_bound": round(bound / cpu, 3),
    }


def rate(dtype: torch.dtype) -> float:
    """Operations a second of a processor that multiplies two square matrices: the best of five."""
    one, two = torch.randn(2, SIDE, SIDE).to(dtype)
    best = 0.0
    for _ in range(5):
        start = time.process_time()
        one @ two
        best = max(best, 2 * SIDE**3 / (time.process_time() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--step", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--rows", type=int, default=1, help="take only one of so many rows, for a quick look")
    parser.add_argument("--dry", action="store_true", help="print, and leave the results as they are")
    options = parser.parse_args()
    rates = {str(dtype).removeprefix("torch."): rate(dtype) for dtype in (torch.float32, torch.float64)}
    print(json.dumps(rates), flush=True)
    rows = []
    for name in options.problem:
        for step in options.step:
            out, columns = PROBLEMS[name][0] // options.rows, PROBLEMS[name][1]
            with get_context("spawn").Pool(1) as alone:  # or memory that an earlier step has freed would be its own
                found = alone.apply(measure, (step, out, columns, rates))
            rows.append({"problem": name, "rows": out, "columns": columns, "step": step, **found})
            print(json.dumps(rows[-1]), flush=True)
    if not options.dry:
        results = {"operations_per_second": rates, "costs": rows}
        print(common.write("solvers", "python benchmarks/solvers.py", results))


if __name__ == "__main__":
    main()
