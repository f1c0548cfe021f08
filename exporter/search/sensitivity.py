"""What every choice for every input changes of a model's weights.

For a choice of bits the linears that read an input are solved as an export would solve them, from the Gram matrix of
the input in full precision. What that changes of each weight, D, waits on the disk until `fisher.py` asks what it does
to the answers.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
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
from vlmq.exporter.statistics import Statistics
from vlmq.exporter.walk import Block, Input, Site, Walk
from vlmq.formats.compressed_tensors import packed_bytes


@dataclass(frozen=True)
class Choice:
    """What a linear may be given; group None: as its recipe has it. 16 bits are full precision."""

    bits: int
    group: int | None = None


@dataclass(frozen=True)
class Item:
    """Linears that read one input and so get one choice: the bytes of each, and a file of what each changes."""

    component: Component
    sites: tuple[str, ...]
    bytes: dict[Choice, int]
    file: Path

    @property
    def choices(self) -> list[Choice]:
        """Below 16 bits, which change nothing."""
        return [choice for choice in self.bytes if choice.bits != FULL]

    def changes(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Every linear, and D (out, in) float32 of every choice."""
        with safe_open(self.file, "pt") as file:
            for site in self.sites:
                yield site, [file.get_tensor(_key(choice, site)).float() for choice in self.choices]


def _key(choice: Choice, site: str) -> str:
    return f"{choice.bits}/{choice.group}/{site}"


def items(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    walk: Walk,
    assignments: Mapping[Choice, Assignment],
    batches: Sequence[Inputs],
    folder: Path,
    progress: Progress = silent,
) -> list[Item]:
    """One item for every input of a block that has a linear to choose for; what it changes is kept in `folder`.

    model: the whole checkpoint, in memory, float32, on any device; left as it was. assignments: of every choice below
    16 bits, all with the same sites. Two bytes are kept of each weight for each choice.
    """
    found: list[Item] = []
    calibration = Calibration(model, batches, device=model.device)
    stages = [stage for stage in walk.stages if stage[0].sites[0].kind not in ("embedding", "head")]
    total, done = sum(map(len, stages)), 0
    for stage in stages:
        calls = calibration.calls(stage)
        for block in stage:
            progress("choices", done, total)
            found += _of_block(block, checkpoint, model, assignments, calls.values(), folder)
            done += 1
        calibration.finish(stage, calls)
    progress("choices", total, total)
    return found


@torch.no_grad()
def _of_block(
    block: Block,
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    assignments: Mapping[Choice, Assignment],
    calls: Collection[Call],
    folder: Path,
) -> Iterator[Item]:
    """The items of a block, which is then behind the calls."""
    rounded = any(scheme.inputs for assignment in assignments.values() for scheme in assignment.schemes.values())
    statistics, outputs = gather(block, model, calls, [Wanted(rows=rounded)] * len(block.inputs), all_outputs=True)
    for call, output in zip(calls, outputs, strict=True):
        call.hidden = output
    width = stored_dtype(checkpoint).itemsize
    for index, (entry, seen) in enumerate(zip(block.inputs, statistics, strict=True)):
        free = [site for site in entry.sites if all(site.name in each.schemes for each in assignments.values())]
        if not free:
            continue
        size = {Choice(FULL): sum(site_bytes(site, None, width) for site in free)}
        kept: dict[str, Tensor] = {}
        for choice, assignment in assignments.items():
            schemes = {site.name: assignment.schemes[site.name] for site in free}
            size[choice] = sum(site_bytes(site, schemes[site.name], width) for site in free)
            given = Given(checkpoint, model, {name: _simple(each) for name, each in schemes.items()}, model.device)
            changed = _changed(replace(entry, sites=tuple(free)), given, seen)
            kept |= {_key(choice, name): error.bfloat16().cpu() for name, error in changed.items()}
        file = folder / f"{block.name}.{index}.safetensors"
        save_file(kept, file)
        yield Item(block.component, tuple(site.name for site in free), size, file)


def site_bytes(site: Site, scheme: Scheme | None, width: int) -> int:
    """What a linear takes in a file, its scales and zeros included; width: bytes of a stored value."""
    if scheme is None:
        return site.rows * site.columns * width
    return packed_bytes((site.rows, site.columns), scheme.grid.stored, width, scheme.inputs)


def _simple(scheme: Scheme) -> Scheme:
    """The scheme without what looks at more than the Gram matrix of its input."""
    return replace(scheme, options=scheme.options.model_copy(update={"awq_loss": "gram", "gptaq": False}))


def _changed(entry: Input, given: Given, seen: Statistics) -> dict[str, Tensor]:
    """D (out, in) of every site that reads an input, solved with the scale that its method folds before it."""
    names = [site.name for site in entry.sites]
    scale = choose_scale(entry, given, seen, _no_trial)
    parameters = {name: given.model.get_parameter(f"{name}.weight") for name in names}
    kept = {name: parameter.clone() for name, parameter in parameters.items()}
    try:
        if scale is not None:
            seen = seen.divided_by(scale)
            for parameter in parameters.values():
                parameter.mul_(scale)
        solved = {name: dense(weight) for name, weight in solve_input(names, given, seen).items()}
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])
    if scale is not None:
        solved = {name: weight.div_(scale) for name, weight in solved.items()}
    return {name: weight - parameters[name] for name, weight in solved.items()}


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
