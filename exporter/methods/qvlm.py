"""Q-VLM: blocks of dependent layers, and the percentiles that bound what they read (paper 004, section 3.2).

A *layer* of the paper is a block here (one transformer layer), and x^(k) what block k puts out: eq. 4 pairs the element
ij of x^(k) with the element ij of x^(k+1), which only tensors of equal shape have; the linears inside a transformer
layer differ in width, the hidden states between the layers do not.

What Q_k chooses is the percentile p of the full-precision distribution that bounds the activations of block k: each
of its sites with an input grid gets the (1 - p) and p quantiles of its own input, one p for the whole block. Weights
lie on their grid with the clip that minimises the error of the outputs (the paper starts from it: section 4.1), which
the Gram matrix gives.

As printed, the exponent of eq. 5 is divided by the interval, not by its square: an assignment is the sharper
the larger the activations are. So it is here.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlmq.kernels.grid import Limits

PERCENTILES = (1.0, 0.995, 0.99, 0.985, 0.98)  # section 4.1
MOST = 3  # layers of a block: section 4.2


def levels_between(low: float | Tensor, high: float | Tensor, bits: int) -> Tensor:
    """The rounding points q_m of eq. 5: (2**bits,) float32, evenly from low to high, which is larger."""
    steps = torch.linspace(0, 1, 2**bits, device=low.device if isinstance(low, Tensor) else None)
    return low + (high - low) * steps


def soft_assignment(x: Tensor, levels: Tensor) -> Tensor:
    """Eq. 5: how probably each element is rounded to each level; differentiable.

    x (...), levels (M,) evenly spaced  ->  (..., M), which sums to 1.
    """
    interval = levels[1] - levels[0]
    return (-(x.unsqueeze(-1) - levels).square() / interval).softmax(-1)


def conditional_entropy(p_k: Tensor, p_next: Tensor) -> Tensor:
    """Eq. 4, D(k, k + 1): how uncertain x^(k+1) is where x^(k) is known, in nats an element; differentiable.

    p_k (elements, M) and p_next (elements, N), the assignments of the same elements ij of neighbouring layers  ->  ().
    Their joint distribution over pairs of levels is the mean over the elements.
    """
    joint = p_k.T @ p_next / len(p_k)
    known = joint.sum(1, keepdim=True)
    tiny = torch.finfo(joint.dtype).tiny
    return (joint * (known.clamp(min=tiny).log() - joint.clamp(min=tiny).log())).sum()


def partition(dependencies: Sequence[float], threshold: float | None = None, most: int = MOST) -> list[range]:
    """Eq. 6 and 7: the layers in blocks, from the front, each as long as its dependency allows, of at most `most`.

    dependencies: D(k, k + 1) of the n layers, n - 1 of them. A block reaches from layer r to the furthest s with
    D(r, s) > (s - r) h0, where D(r, s) adds up the s - r pairs inside it (eq. 6 as printed also counts the pair
    that leaves the block, which no division by s - r fits). threshold: h0; None: the mean of the dependencies.
    """
    if threshold is None:
        threshold = math.fsum(dependencies) / max(len(dependencies), 1)
    blocks: list[range] = []
    first = 0
    while first <= len(dependencies):
        furthest = min(first + most - 1, len(dependencies))
        last = next(
            last
            for last in range(furthest, first - 1, -1)
            if last == first or math.fsum(dependencies[first:last]) > (last - first) * threshold
        )
        blocks.append(range(first, last + 1))
        first = last + 1
    return blocks


def limits_at(rows: Tensor, percentile: float) -> Limits:
    """The (1 - p) and p quantiles of the values (nearest rank); p = 1.0: their extremes."""
    values = rows.flatten()
    above = round((1 - percentile) * (len(values) - 1))  # how many are larger than the upper limit
    return Limits(values.kthvalue(above + 1).values.item(), values.kthvalue(len(values) - above).values.item())
