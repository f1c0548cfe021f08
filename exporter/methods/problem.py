"""What a method that rescales an input is asked: the linears that read it, and all that is known of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq.exporter.scheme import Scheme
from vlmq.exporter.statistics import Statistics

Trial = Callable[[Tensor], float]


@dataclass(frozen=True)
class Problem:
    """weights: of the linears (or of the rows of them that are quantized), each (out, in) float32.

    schemes: one for each weight. dtype: what scales are stored in.
    trial: the squared error of the whole block's output if the input were rescaled so; runs the block.
    """

    weights: list[Tensor]
    schemes: list[Scheme]
    statistics: Statistics
    dtype: torch.dtype
    trial: Trial
