"""What calibration keeps of an input: sums over tokens, whose size does not grow with their number.

One `Statistics` per distinct input of a block; `sums.py` makes them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 512  # columns of a Gram matrix at once: it is symmetric, so what lies below them need not be multiplied


@dataclass(frozen=True)
class Statistics:
    """Of the rows x of an input, each with a weight w (1 unless tokens are weighted):

    gram = sum w x x^T (in, in); absolute = sum |x| (in,); low and high, the extremes (in,); tokens, how many.
    cross = sum w (r - x) x^T (in, in), where r is what the full-precision model reads in place of x; None: not kept.
    rows (k, in), row_weights (k,): some of the rows themselves, evenly drawn, for what no sum can tell.
    """

    gram: Tensor
    absolute: Tensor
    low: Tensor
    high: Tensor
    rows: Tensor
    row_weights: Tensor
    cross: Tensor | None = None
    tokens: int = 0

    @property
    def mean_absolute(self) -> Tensor:
        return self.absolute / max(self.tokens, 1)

    @property
    def maximum(self) -> Tensor:
        """max |x| (in,)"""
        return torch.maximum(-self.low, self.high)

    def divided_by(self, scale: Tensor) -> "Statistics":
        """The statistics of x / scale (positive), which need no second look at x."""
        return replace(
            self,
            gram=_divided(self.gram, scale),
            absolute=self.absolute / scale,
            low=self.low / scale,
            high=self.high / scale,
            rows=self.rows / scale,
            cross=None if self.cross is None else _divided(self.cross, scale),
        )


def evenly(count: int, keep: int) -> Tensor:
    """Indices of at most `keep` of `count` rows: the middles of equal runs. A prompt's first token is like no other."""
    keep = min(keep, count)
    return ((torch.arange(keep) + 0.5) * (count / max(keep, 1))).long()


def output_loss(error: Tensor, gram: Tensor) -> Tensor:
    """sum over tokens of ||error x||^2 = tr(error gram error^T): error (..., out, in), gram (..., in, in) -> (...)."""
    return row_losses(error, gram).sum(-1)


def row_losses(error: Tensor, gram: Tensor) -> Tensor:
    """The same for every row e of `error`, e gram e^T: (..., out).

    gram is symmetric: what its blocks above the diagonal add counts twice, and those below are not multiplied.
    """
    total = error.new_zeros(error.shape[:-1])
    for block in blocks(error.shape[-1]):
        product = error[..., block] @ gram[..., block, block]
        if block.start:
            above = error[..., : block.start] @ gram[..., : block.start, block]
            product.add_(above, alpha=2)
        total += product.mul_(error[..., block]).sum(-1)
    return total


def blocks(columns: int) -> list[slice]:
    """The columns of a Gram matrix, BLOCK at once."""
    return [slice(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]


def _divided(gram: Tensor, scale: Tensor) -> Tensor:
    """gram / outer(scale, scale), a few rows at a time: (in, in)."""
    divided = torch.empty_like(gram)
    for block in blocks(len(gram)):
        torch.div(gram[block], torch.outer(scale[block], scale), out=divided[block])
    return divided
