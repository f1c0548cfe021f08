"""The quantizers by name. A method says how an input is rescaled (None: not at all) and how codes are chosen.

The two are independent: `awq+gptq` takes the scale of one and the codes of the other. `awq+smoothquant` is a scale.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq.exporter.methods import awq, gptq, group_aware, rtn, smoothquant
from vlmq.exporter.methods.problem import Problem
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.statistics import Statistics
from vlmq.kernels.grid import TENSOR, QuantizedWeight

Rescale = Callable[[Problem], Tensor]
Solve = Callable[[Tensor, Statistics, Scheme, torch.dtype], QuantizedWeight]


@dataclass(frozen=True)
class Method:
    """`rescale` picks a scale to fold before an input; `solve` turns a weight (out, in) float32 into codes.

    calibrated: whether it looks at the statistics. percentiles: whether the ranges of inputs are searched.
    """

    solve: Solve
    rescale: Rescale | None = None
    calibrated: bool = True
    percentiles: bool = False

    @property
    def for_inputs(self) -> bool:
        """Whether it is about rounding inputs, and has nothing to do where they are not rounded."""
        return self.percentiles or self.rescale in (smoothquant.rescale, group_aware.rescale)


METHODS: dict[str, Method] = {
    "uniform": Method(rtn.solve, calibrated=False),  # rtn on the grid that paper 002 has: see the recipe
    "rtn": Method(rtn.solve, calibrated=False),
    "awq": Method(awq.solve, awq.rescale),
    "gptq": Method(gptq.solve),
    "smoothquant": Method(rtn.solve, smoothquant.rescale),
    "awq+smoothquant": Method(rtn.solve, group_aware.rescale),
    "qvlm": Method(awq.solve, percentiles=True),
    "awq+gptq": Method(gptq.solve, awq.rescale),
    "smoothquant+gptq": Method(gptq.solve, smoothquant.rescale),
    "awq+smoothquant+gptq": Method(gptq.solve, group_aware.rescale),
    "smoothquant+qvlm": Method(awq.solve, smoothquant.rescale, percentiles=True),
}


def is_calibrated(scheme: Scheme) -> bool:
    """Whether a site needs calibration samples: its method does, or the one range its input is rounded in."""
    return METHODS[scheme.method].calibrated or (scheme.inputs is not None and scheme.inputs.group == TENSOR)
