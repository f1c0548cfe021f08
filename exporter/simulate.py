"""A quantized model in memory, its weights dequantized: for benchmarks and sweeps that ask about answers alone."""

import torch
from torch import nn
from transformers import PreTrainedModel

from vlmq.exporter.calibration import Calibration, prepare
from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.load import load
from vlmq.exporter.quantize import Solved, quantize
from vlmq.exporter.recipe import Recipe
from vlmq.exporter.runtime import open_processor
from vlmq.exporter.samples import Sample
from vlmq.exporter.walk import walk
from vlmq.kernels.grid import QuantizedWeight


@torch.no_grad()
def simulate(
    checkpoint: Checkpoint, recipe: Recipe, samples: tuple[Sample, ...]
) -> tuple[PreTrainedModel, dict[str, Solved]]:
    """The model an export would hold, float32 and dense, and what became of each site."""
    model = checkpoint.skeleton()
    plan = walk(model, checkpoint.family)
    calibration = Calibration(model, prepare(samples, open_processor(checkpoint.folder), checkpoint.family))
    simulated = load(checkpoint.folder)
    solved: dict[str, Solved] = {}
    for block in quantize(checkpoint, model, plan, recipe.assign(plan), calibration):
        for name, site in block.sites.items():
            weight = site.weight.dequantize() if isinstance(site.weight, QuantizedWeight) else site.weight
            _set(simulated, f"{name}.weight", weight)
        for name, tensor in block.changed.items():
            _set(simulated, name, tensor)
        solved |= block.sites
    return simulated, solved


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    model.get_parameter(name).copy_(value)
