"""Round to nearest: every weight takes the nearest level of its group's grid. Needs no calibration.

With a per-tensor asymmetric grid this is the k-bit uniform quantization of paper 002 (A.1),

    s = (x - min)/(max - min),   q = round((2^k - 1) s)/(2^k - 1),   Q = (max - min) q + min

(printed there with the sign of max - min turned round), its offset `min` rounded to a multiple of the step: so 0
stays 0, and formats with integer zeros can hold it. Where max == min there is nothing to divide by, and x is kept.
"""

import torch
from torch import Tensor

from vlmq.exporter.scheme import Scheme
from vlmq.exporter.statistics import Statistics
from vlmq.kernels.grid import QuantizedWeight, to_grid


def solve(weight: Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """weight (out, in) float32 -> its nearest point on the grid, scales stored in `dtype`."""
    return to_grid(weight, scheme.grid, dtype)
