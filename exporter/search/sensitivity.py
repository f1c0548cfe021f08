"""What every choice for every input costs: the error of the linears that read it, weighed by what it does to the loss.

For a choice of bits the linears that read an input are solved as an export would solve them, from the Gram matrix H of
the input in full precision. D is what that changes of a weight, so e_j = (D H D^T)_jj / tokens is the mean square error
of output channel j, and with the mean square gradients G_j of `fisher.py` the divergence of the answers grows by about

    1/2 sum_j G_j e_j        nats

Errors of different linears are taken to add up. What that leaves out is measured for each component (`refine.py`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.exporter import ends
from vlmq.exporter.calibration import Calibration, Call, Inputs, Wanted, gather
from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.families import Component
from vlmq.exporter.inspection import stored_dtype
from vlmq.exporter.progress import Progress, silent
from vlmq.exporter.recipe import Assignment
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.settings import FULL
from vlmq.exporter.solving import Given, choose_scale, dense, solve_input
from vlmq.exporter.statistics import Statistics, row_losses
from vlmq.exporter.walk import Block, Input, Site, Walk
from vlmq.formats.compressed_tensors import packed_bytes


@dataclass(frozen=True)
class Choice:
    """What a linear may be given; group None: as its recipe has it. 16 bits are full precision."""

    bits: int
    group: int | None = None


@dataclass(frozen=True)
class Item:
    """Linears that read one input and so get one choice: of each choice the bytes, and the cost in nats."""

    component: Component
    sites: tuple[str, ...]
    bytes: dict[Choice, int]
    cost: dict[Choice, float]


def items(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    walk: Walk,
    assignments: Mapping[Choice, Assignment],
    weights: Mapping[str, Tensor],
    batches: Sequence[Inputs],
    progress: Progress = silent,
) -> list[Item]:
    """One item for every input of a block that has a linear to choose for.

    model: the whole checkpoint, in memory, float32; left as it was. assignments: of every choice below 16 bits, all
    with the same sites. weights: G_j of each site (rows,).
    """
    found: list[Item] = []
    calibration = Calibration(model, batches)
    stages = [stage for stage in walk.stages if stage[0].sites[0].kind not in ("embedding", "head")]
    total, done = sum(map(len, stages)), 0
    for stage in stages:
        calls = calibration.calls(stage)
        for block in stage:
            progress("sensitivity", done, total)
            found += _of_block(block, checkpoint, model, assignments, weights, calls.values())
            done += 1
        calibration.finish(stage, calls)
    progress("sensitivity", total, total)
    return found


@torch.no_grad()
def _of_block(
    block: Block,
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    assignments: Mapping[Choice, Assignment],
    weights: Mapping[str, Tensor],
    calls: Collection[Call],
) -> list[Item]:
    """The items of a block, which is then behind the calls."""
    rounded = any(scheme.inputs for assignment in assignments.values() for scheme in assignment.schemes.values())
    statistics, outputs = gather(block, model, calls, [Wanted(rows=rounded)] * len(block.inputs), all_outputs=True)
    for call, output in zip(calls, outputs, strict=True):
        call.hidden = output
    width = stored_dtype(checkpoint).itemsize
    made = []
    for entry, seen in zip(block.inputs, statistics, strict=True):
        free = [site for site in entry.sites if all(site.name in each.schemes for each in assignments.values())]
        if not free:
            continue
        full = Choice(FULL)
        size = {full: sum(site_bytes(site, None, width) for site in free)}
        cost = {full: 0.0}
        for choice, assignment in assignments.items():
            schemes = {site.name: assignment.schemes[site.name] for site in free}
            size[choice] = sum(site_bytes(site, schemes[site.name], width) for site in free)
            given = Given(checkpoint, model, {name: _simple(scheme) for name, scheme in schemes.items()})
            errors = _errors(replace(entry, sites=tuple(free)), given, seen)
            cost[choice] = sum(
                0.5 * float(weights[name] @ error.double()) / max(seen.tokens, 1) for name, error in errors.items()
            )
        made.append(Item(block.component, tuple(site.name for site in free), size, cost))
    return made


def site_bytes(site: Site, scheme: Scheme | None, width: int) -> int:
    """What a linear takes in a file, its scales and zeros included; width: bytes of a stored value."""
    if scheme is None:
        return site.rows * site.columns * width
    return packed_bytes((site.rows, site.columns), scheme.grid.stored, width, scheme.inputs)


def _simple(scheme: Scheme) -> Scheme:
    """The scheme without what looks at more than the Gram matrix of its input."""
    return replace(scheme, options=scheme.options.model_copy(update={"awq_loss": "gram", "gptaq": False}))


def _errors(entry: Input, given: Given, seen: Statistics) -> dict[str, Tensor]:
    """(D H D^T)_jj of every site that reads an input (rows,), solved with the scale that its method folds before it."""
    names = [site.name for site in entry.sites]
    scale = choose_scale(entry, given, seen, _no_trial)
    parameters = {name: given.model.get_parameter(f"{name}.weight") for name in names}
    kept = {name: parameter.clone() for name, parameter in parameters.items()}
    try:
        if scale is not None:
            seen = seen.divided_by(scale)
            for parameter in parameters.values():
                parameter.mul_(scale)
        solved = solve_input(names, given, seen)
        return {name: row_losses(dense(weight) - parameters[name], seen.gram) for name, weight in solved.items()}
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])


def _no_trial(scale: Tensor) -> float:
    raise RuntimeError("a scale is sought by the error of its linears here, not of their block")


def is_chosen_for(walk: Walk, assignment: Assignment) -> bool:
    """Whether a recipe leaves anything to choose for."""
    stages = (stage for stage in walk.stages if not ends.is_embedding(stage))
    return any(
        site.name in assignment.schemes and site.kind != "head"
        for stage in stages
        for block in stage
        for site in block.sites
    )
