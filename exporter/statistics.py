"""What calibration keeps of an input: sums over tokens, whose size does not grow with their number.

One `Statistics` per distinct input of a block. Sums add up, so samples can be split over workers and merged.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmq.exporter import workers

BLOCK = 512  # columns of a Gram matrix at once: it is symmetric, so what lies below them need not be multiplied


@dataclass
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

    @classmethod
    def empty(cls, columns: int, device: torch.device | str = "cpu", cross: bool = False) -> "Statistics":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device)

        return cls(
            gram=zeros(columns, columns),
            absolute=zeros(columns),
            low=torch.full((columns,), torch.inf, device=device),
            high=torch.full((columns,), -torch.inf, device=device),
            rows=zeros(0, columns),
            row_weights=zeros(0),
            cross=zeros(columns, columns) if cross else None,
        )

    def add(self, x: Tensor, weights: Tensor | None = None, reference: Tensor | None = None, keep: int = 0) -> None:
        """Take in an input (..., in), with a weight for every token (...,), and what the reference reads (..., in).

        keep: how many of its rows are kept.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        weight = torch.ones(len(rows), device=rows.device) if weights is None else weights.reshape(-1).float()
        weighted = rows if weights is None else rows * weight.unsqueeze(1)
        for block in _blocks(rows.shape[1]):
            self.gram[: block.stop, block].addmm_(weighted[:, : block.stop].T, rows[:, block])
            self.gram[block, : block.start] = self.gram[: block.start, block].T
        self.absolute += rows.abs().sum(0)
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))
        self.tokens += len(rows)
        if self.cross is not None and reference is not None:
            self.cross.addmm_((reference.detach().reshape_as(rows).float() - rows).T, weighted)
        if keep:
            chosen = evenly(len(rows), keep).to(rows.device)
            self.rows = torch.cat([self.rows, rows[chosen]])
            self.row_weights = torch.cat([self.row_weights, weight[chosen]])

    def of_all_workers(self) -> "Statistics":
        """The statistics of what all workers took in; the tensors of this one are changed."""
        return Statistics(
            gram=workers.total(self.gram),
            absolute=workers.total(self.absolute),
            low=workers.least(self.low),
            high=workers.most(self.high),
            rows=workers.joined(self.rows),
            row_weights=workers.joined(self.row_weights),
            cross=None if self.cross is None else workers.total(self.cross),
            tokens=int(workers.number(self.tokens)),
        )

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
    for block in _blocks(error.shape[-1]):
        product = error[..., block] @ gram[..., block, block]
        if block.start:
            above = error[..., : block.start] @ gram[..., : block.start, block]
            product.add_(above, alpha=2)
        total += product.mul_(error[..., block]).sum(-1)
    return total


def _blocks(columns: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]


def _divided(gram: Tensor, scale: Tensor) -> Tensor:
    """gram / outer(scale, scale), a few rows at a time: (in, in)."""
    divided = torch.empty_like(gram)
    for block in _blocks(len(gram)):
        torch.div(gram[block], torch.outer(scale[block], scale), out=divided[block])
    return divided
