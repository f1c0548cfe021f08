"""Quantizing: one block after the other, each on what the quantized blocks before it put out.

For every block: read its weights, gather the statistics of its inputs, fold the scales its methods choose, check that
the folds changed nothing, choose the codes, and run the quantized block to get the next block's inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmq.exporter import folds
from vlmq.exporter.calibration import Calibration, Call, gather
from vlmq.exporter.checkpoint import Checkpoint, release
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.progress import Progress
from vlmq.exporter.recipe import Assignment, Scheme
from vlmq.exporter.statistics import Statistics, output_loss
from vlmq.exporter.walk import Block, Input, Walk
from vlmq.kernels.grid import QuantizedWeight


@dataclass(frozen=True)
class Solved:
    """What one site became: its codes, or, where only some of its rows are quantized, the dense weight they give.

    loss: tr(D H D^T) / tr(W H W^T), the relative squared error of its outputs on the calibration samples.
    """

    weight: QuantizedWeight | Tensor
    scheme: Scheme
    folded: bool
    loss: float | None


@dataclass(frozen=True)
class QuantizedBlock:
    """A finished block: what its sites became, and its other tensors that a fold changed, in the source's dtype."""

    block: Block
    sites: dict[str, Solved]
    changed: dict[str, Tensor]


@torch.no_grad()
def quantize(
    checkpoint: Checkpoint,
    model: nn.Module,
    walk: Walk,
    assignment: Assignment,
    calibration: Calibration | None,
    progress: Progress = lambda what, done, of: None,
) -> Iterator[QuantizedBlock]:
    """Every block in the order it runs; `calibration` is None when no method of the assignment looks at inputs."""
    done, count = 0, len(walk.blocks)
    if calibration:
        _fill_outside(checkpoint, model, walk)
    for stage in walk.stages:
        calls = calibration.calls(stage) if calibration else {}
        if (
            calibration
            and not calls
            and any(site.name in assignment.schemes for block in stage for site in block.sites)
        ):
            what = stage[0].component
            raise VlmqError(
                f"calibration: no sample has an image, and the {what} sees nothing else; pass --{what}-bits 16"
            )
        for block in stage:
            progress("quantizing", done, count)
            module = model.get_submodule(block.name)
            checkpoint.fill(module, block.name)
            yield _quantize_block(block, model, assignment.schemes, checkpoint, list(calls.values()))
            for call in calls.values():
                call.hidden = call.run(module)
            release(module)
            done += 1
        if calibration:
            calibration.finish(stage, calls)
    progress("quantizing", count, count)


def _fill_outside(checkpoint: Checkpoint, model: nn.Module, walk: Walk) -> None:
    """Read what lies outside the blocks and runs before them: embeddings, norms, query tokens; not the output head."""
    skipped = tuple(f"{name}." for name in (*(block.name for block in walk.blocks), *walk.kept))
    for name, module in model.named_modules():
        if not f"{name}.".startswith(skipped):
            checkpoint.fill(module, name, recurse=False)


def _quantize_block(
    block: Block, model: nn.Module, schemes: dict[str, Scheme], checkpoint: Checkpoint, calls: list[Call]
) -> QuantizedBlock:
    module = model.get_submodule(block.name)
    before = {
        name: tensor.clone()
        for name, tensor in module.named_parameters(block.name)
        if name.removesuffix(".weight") not in schemes
    }
    statistics, output = gather(block, model, calls) if calls else ([None] * len(block.inputs), None)
    dtype = {site.name: checkpoint.dtype(f"{site.name}.weight") for site in block.sites}

    folded: dict[str, bool] = {}
    for index, (entry, seen) in enumerate(zip(block.inputs, statistics, strict=True)):
        scale = _rescale(entry, model, schemes, seen, dtype)
        if scale is not None:
            folds.fold(entry, scale, model)
            statistics[index] = seen.divided_by(scale)
        folded |= {site.name: scale is not None for site in entry.sites}
    if output is not None and any(folded.values()):
        folds.check(block.name, output, calls[0].run(module))

    solved = {}
    for entry, seen in zip(block.inputs, statistics, strict=True):
        for site in entry.sites:
            if site.name in schemes:
                solved[site.name] = _solve(
                    site.name, model, schemes[site.name], seen, dtype[site.name], folded[site.name]
                )
    return QuantizedBlock(block, solved, _settle(block, model, before, solved, checkpoint))


def _rescale(
    entry: Input, model: nn.Module, schemes: dict[str, Scheme], seen: Statistics | None, dtype: dict[str, torch.dtype]
) -> Tensor | None:
    """The scale to fold before an input; None where there is nowhere to fold it, or no method that wants one."""
    sites = [site for site in entry.sites if site.name in schemes]
    if entry.source is None or seen is None or not sites:
        return None
    rescale = METHODS[schemes[sites[0].name].method].rescale
    if rescale is None:
        return None
    weights = [_rows(model.get_parameter(f"{site.name}.weight"), schemes[site.name]) for site in sites]
    scale = rescale(weights, seen, [schemes[site.name].grid for site in sites], dtype[sites[0].name])
    return None if bool((scale == 1).all()) else scale


def _rows(weight: Tensor, scheme: Scheme) -> Tensor:
    """The rows of a weight that its scheme quantizes."""
    return weight if scheme.rows is None else torch.cat([weight[rows] for rows in scheme.rows])


def _solve(
    name: str, model: nn.Module, scheme: Scheme, seen: Statistics | None, dtype: torch.dtype, folded: bool
) -> Solved:
    weight = model.get_parameter(f"{name}.weight")
    solve = METHODS[scheme.method].solve
    found: QuantizedWeight | Tensor
    if scheme.rows is None:
        found = solve(weight, seen, scheme.grid, dtype)
        dense = found.dequantize()
    else:
        parts = [solve(weight[rows], seen, scheme.grid, dtype) for rows in scheme.rows]
        dense = weight.clone()
        for rows, part in zip(scheme.rows, parts, strict=True):
            dense[rows] = part.dequantize()
        if sum(len(part.codes) for part in parts) == len(weight):
            found = _stack(parts)
        else:  # a linear of which some rows stay dense is stored dense, rounded to what the file holds
            found = dense.to(dtype)
            dense = found.float()
    return Solved(found, scheme, folded, _relative_loss(dense, weight, seen))


def _stack(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """The parts of a fused projection as one weight: rows have scales of their own, so nothing else changes."""
    return QuantizedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.zero for part in parts]),
        parts[0].grid,
    )


def _relative_loss(dense: Tensor, weight: Tensor, seen: Statistics | None) -> float | None:
    if seen is None:
        return None
    return (output_loss(dense - weight, seen.gram) / output_loss(weight, seen.gram).clamp(min=1e-30)).item()


def _settle(
    block: Block, model: nn.Module, before: dict[str, Tensor], solved: dict[str, Solved], checkpoint: Checkpoint
) -> dict[str, Tensor]:
    """Give the block the weights that will be written, and return those that folds changed, as they are written."""
    changed = {}
    for name, parameter in model.get_submodule(block.name).named_parameters(block.name):
        site = solved.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if site is not None:
            weight = site.weight
            parameter.copy_(weight.dequantize() if isinstance(weight, QuantizedWeight) else weight)
        elif not torch.equal(parameter, before[name]):
            changed[name] = parameter.to(checkpoint.dtype(name))
            parameter.copy_(changed[name])
    return changed
