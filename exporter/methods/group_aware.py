"""Group-aware W4A4 (paper 001, section 2.3): AWQ's search with everything that will be rounded inside its loss.

First AWQ's scale mean|x|^a, chosen by the error of rounded weights on rounded inputs, each in its groups; then
SmoothQuant's on what that leaves, chosen likewise. "No scaling" is among the candidates of both.
"""

from dataclasses import replace

from torch import Tensor

from vlmq.exporter.methods import awq, smoothquant
from vlmq.exporter.methods.problem import Problem
from vlmq.exporter.methods.rounded import best


def rescale(problem: Problem) -> Tensor:
    """The scale s (in,) for an input, float32."""
    first = best(problem, (awq.candidate(problem.statistics, exponent) for exponent in awq.EXPONENTS))
    rest = replace(
        problem,
        weights=[weight * first for weight in problem.weights],
        statistics=problem.statistics.divided_by(first),
    )
    return first * smoothquant.rescale(rest)
