"""Folds: moving a scale from a linear's input into whatever comes before it, without changing what they compute.

    W x = (W diag(s)) (diag(1/s) x)

The linears that read x take s on their columns; the norm or linear that makes x takes 1/s on its outputs, bias
included. A fold is checked by running the block before and after (DESIGN.md, promise 2).
"""

import torch
from torch import Tensor, nn

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.walk import Input

TOLERANCE = 1e-5  # relative error of a block's output, float32


@torch.no_grad()
def fold(entry: Input, scale: Tensor, model: nn.Module) -> None:
    """Multiply the columns of the linears that read an input by `scale` (in,), and divide what makes the input."""
    if entry.source is None:
        raise ValueError(f"{entry.sites[0].name}: nothing before it can absorb a scale")
    source = model.get_submodule(entry.source.name)
    rows = entry.source.rows or slice(None)
    source.weight[rows] /= scale if source.weight.ndim == 1 else scale.unsqueeze(1)  # type: ignore[operator,index]
    if getattr(source, "bias", None) is not None:
        source.bias[rows] /= scale  # type: ignore[operator,index]
    for site in entry.sites:
        model.get_submodule(site.name).weight *= scale  # type: ignore[operator]


def check(block: str, before: Tensor, after: Tensor) -> None:
    """Refuse a fold that changed a block's output by more than TOLERANCE relative to its size."""
    error = ((after - before).norm() / before.norm().clamp(min=1e-30)).item()
    if not error <= TOLERANCE:  # a NaN is refused too
        raise VlmqError(
            f"{block}: folding changed its output by {error:.1e} of its size; report this, or use --method rtn"
        )
