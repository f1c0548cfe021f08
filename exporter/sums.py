"""What calibration adds up of an input, batch by batch, until it is `Statistics`.

Each batch is multiplied in float32, and what it gives is added up in float64: sums of that precision come out alike in
whatever order batches and workers are taken, and a few hundred of them lose no bit that float32 would have kept. A Gram
matrix is symmetric, so only the half above its diagonal is held, in as many bytes as the whole would be in float32.
"""

import torch
from torch import Tensor

from vlmq.exporter import workers
from vlmq.exporter.statistics import Statistics, blocks, evenly


class Sums:
    """Of the rows x of an input, each with a weight w: see `Statistics`.

    cross: whether to compare with what the full-precision model reads.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", cross: bool = False) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.panels = [zeros(block.stop, block.stop - block.start) for block in blocks(columns)]  # of the Gram matrix
        self.absolute = zeros(columns)
        self.low = torch.full((columns,), torch.inf, device=device)
        self.high = torch.full((columns,), -torch.inf, device=device)
        self.rows = [torch.empty(0, columns, device=device)]
        self.row_weights = [torch.empty(0, device=device)]
        self.cross = zeros(columns, columns) if cross else None
        self.tokens = 0

    def add(self, x: Tensor, weights: Tensor | None = None, reference: Tensor | None = None, keep: int = 0) -> None:
        """Take in an input (..., in), with a weight for every token (...,), and what the reference reads (..., in).

        keep: how many of its rows are kept.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        weight = torch.ones(len(rows), device=rows.device) if weights is None else weights.reshape(-1).float()
        weighted = rows if weights is None else rows * weight.unsqueeze(1)
        for block, panel in zip(blocks(rows.shape[1]), self.panels, strict=True):
            panel += weighted[:, : block.stop].T @ rows[:, block]
        self.absolute += rows.abs().sum(0)
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))
        self.tokens += len(rows)
        if self.cross is not None and reference is not None:
            apart = reference.detach().reshape_as(rows).float() - rows
            for block in blocks(rows.shape[1]):
                self.cross[block] += apart[:, block].T @ weighted
        if keep:
            chosen = evenly(len(rows), keep).to(rows.device)
            self.rows.append(rows[chosen])
            self.row_weights.append(weight[chosen])

    def statistics(self) -> Statistics:
        """Of what all workers took in; nothing can be added afterwards: the sums are given away as they are turned."""
        panels, cross = [workers.total(panel) for panel in self.panels], self.cross
        self.panels, self.cross = [], None
        columns = len(self.absolute)
        gram = torch.empty(columns, columns, device=self.absolute.device)
        for block in reversed(blocks(columns)):  # the largest panel first, for its memory
            panel = panels.pop()
            gram[: block.stop, block] = panel
            gram[block, : block.start] = gram[: block.start, block].T
        return Statistics(
            gram=gram,
            absolute=workers.total(self.absolute).float(),
            low=workers.least(self.low),
            high=workers.most(self.high),
            rows=workers.joined(torch.cat(self.rows)),
            row_weights=workers.joined(torch.cat(self.row_weights)),
            cross=None if cross is None else workers.total(cross).float(),
            tokens=int(workers.number(self.tokens)),
        )
