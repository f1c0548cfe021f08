"""What calibration keeps of an input: sums over tokens, whose size does not grow with their number.

One `Statistics` per distinct input of a block. Sums add up, so samples can be split over workers and merged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Statistics:
    """Of the rows x of an input: gram = sum x x^T (in, in), absolute = sum |x| (in,), maximum = max |x| (in,)."""

    gram: Tensor
    absolute: Tensor
    maximum: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, columns: int, device: torch.device | str = "cpu") -> "Statistics":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device)

        return cls(zeros(columns, columns), zeros(columns), zeros(columns))

    def add(self, x: Tensor) -> None:
        """Take in an input of shape (..., in)."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.gram.addmm_(rows.T, rows)
        self.absolute += rows.abs().sum(0)
        self.maximum = torch.maximum(self.maximum, rows.abs().amax(0))
        self.tokens += len(rows)

    @property
    def mean_absolute(self) -> Tensor:
        return self.absolute / max(self.tokens, 1)

    def divided_by(self, scale: Tensor) -> "Statistics":
        """The statistics of x / scale, which need no second look at x."""
        return Statistics(
            self.gram / torch.outer(scale, scale), self.absolute / scale, self.maximum / scale, self.tokens
        )


def output_loss(error: Tensor, gram: Tensor) -> Tensor:
    """sum over tokens of ||error x||^2 = tr(error gram error^T): error (..., out, in), gram (in, in)  ->  (...)."""
    return ((error @ gram) * error).sum((-2, -1))
