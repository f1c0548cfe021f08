"""A quantized model in memory, its weights dequantized: for benchmarks and sweeps that ask about answers alone."""

import torch
from transformers import PreTrainedModel

from vlmq.exporter import ends
from vlmq.exporter.calibration import Calibration, Inputs, prepare
from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.devices import CPU
from vlmq.exporter.quantize import needs_reference, quantize
from vlmq.exporter.recipe import Recipe
from vlmq.exporter.rotation import rotate
from vlmq.exporter.rounding import InputRounding
from vlmq.exporter.runtime import open_processor
from vlmq.exporter.samples import Sample
from vlmq.exporter.solving import Solved, dense


def simulate(
    checkpoint: Checkpoint, recipe: Recipe, samples: tuple[Sample, ...]
) -> tuple[PreTrainedModel, dict[str, Solved]]:
    """The model an export would hold, float32 and dense, its inputs rounded; and what became of each site."""
    batches = prepare(samples, open_processor(checkpoint.folder), checkpoint.family)
    return simulate_batches(checkpoint, recipe, batches)


@torch.no_grad()
def simulate_batches(
    checkpoint: Checkpoint, recipe: Recipe, batches: list[Inputs], device: torch.device = CPU
) -> tuple[PreTrainedModel, dict[str, Solved]]:
    """`simulate`, on samples that are prepared already; with none, for recipes that look at none.

    device: where blocks are solved, and where the model is in the end.
    """
    checkpoint = rotate(checkpoint, recipe.rotate)
    model = checkpoint.skeleton()
    plan = ends.plan(checkpoint, model, recipe)
    assignment = recipe.assign(plan)
    calibration = Calibration(model, batches, needs_reference(assignment)) if batches else None
    simulated = checkpoint.model().to(device)
    for name in checkpoint.transforms:  # as precise as a file of them would be, and no more
        simulated.get_parameter(name).copy_(checkpoint.read(name))
    solved: dict[str, Solved] = {}
    for block in quantize(checkpoint, model, plan, assignment, calibration, device=device):
        for name, site in block.sites.items():
            simulated.get_parameter(f"{name}.weight").copy_(dense(site.weight))
        for name, tensor in block.changed.items():
            simulated.get_parameter(name).copy_(tensor)
        solved |= block.sites
    grids = {name: site.scheme.inputs for name, site in solved.items() if site.scheme.inputs}
    InputRounding(simulated, grids, {name: solved[name].limits for name in grids})
    return simulated, solved
