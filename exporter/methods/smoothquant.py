"""SmoothQuant (Xiao et al., arXiv 2211.10438; on BLIP-2, paper 001): what is hard to round moves into the weights.

Equation 4: channels with large inputs are divided, and the columns that read them multiplied, by

    s_j = max|X_j|^a / max|W_j|^(1-a)

with a fixed migration strength a, or the one whose rounded inputs and rounded weights together err least.
"""

import torch
from torch import Tensor

from vlmq.exporter.methods.problem import Problem
from vlmq.exporter.methods.rounded import best
from vlmq.exporter.statistics import Statistics

ALPHAS = tuple(step / 20 for step in range(21))


def rescale(problem: Problem) -> Tensor:
    """The scale s (in,) for an input, float32."""
    fixed = problem.schemes[0].options.alpha
    if fixed != "search":
        return smooth(problem.statistics, problem.weights, fixed)
    candidates = [torch.ones_like(problem.statistics.absolute)]
    candidates += [smooth(problem.statistics, problem.weights, alpha) for alpha in ALPHAS]
    return best(problem, candidates)


def smooth(statistics: Statistics, weights: list[Tensor], alpha: float) -> Tensor:
    """Equation 4 for the linears that read one input: weights (out, in) each  ->  (in,), its geometric mean 1.

    A common factor changes nothing but keeps scales near 1, within half precision. A dead channel is left alone.
    """
    inputs = statistics.maximum
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    scale = inputs.clamp(min=1e-5).pow(alpha) / columns.clamp(min=1e-5).pow(1 - alpha)
    alive = (inputs > 0) & (columns > 0)
    scale = scale / scale[alive].log().mean().exp()
    return torch.where(alive, scale, torch.ones_like(scale))
