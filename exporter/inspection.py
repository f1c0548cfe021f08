"""What a model is made of and what a recipe would do to it, from its configuration: nothing is calibrated or read."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from vlmq.exporter import ends
from vlmq.exporter.checkpoint import Checkpoint, open_checkpoint
from vlmq.exporter.families import COMPONENTS
from vlmq.exporter.recipe import Assignment, Recipe
from vlmq.exporter.rotation import rotate
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.walk import Block, Site, Walk
from vlmq.formats import compressed_tensors
from vlmq.kernels.grid import ROW, TENSOR, Grid


@dataclass(frozen=True)
class Linear:
    """One linear of a block: its shape (out, in), its bytes, what the recipe gives it, and the bytes it then has."""

    name: str
    shape: tuple[int, int]
    before: int
    after: int
    plan: str

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Blocks:
    """Consecutive blocks that are equal in every linear: the first's name, how many, and the linears of one."""

    name: str
    count: int
    linears: tuple[Linear, ...]

    @property
    def before(self) -> int:
        return self.count * sum(linear.before for linear in self.linears)

    @property
    def after(self) -> int:
        return self.count * sum(linear.after for linear in self.linears)

    @property
    def parameters(self) -> int:
        return self.count * sum(linear.parameters for linear in self.linears)


@dataclass(frozen=True)
class Inspection:
    """A model by component, the linears that are kept and why, and the bytes of all that is no linear of a block.

    rotated: the components whose streams are; a head that was tied to the embedding then counts as a tensor of its own.
    """

    model: str
    family: str
    components: dict[str, tuple[Blocks, ...]]
    kept: dict[str, str]
    parameters: int
    elsewhere: int  # bytes of embeddings, norms, biases, heads
    rotated: tuple[str, ...] = ()

    @property
    def before(self) -> int:
        return self.elsewhere + sum(blocks.before for found in self.components.values() for blocks in found)

    @property
    def after(self) -> int:
        return self.elsewhere + sum(blocks.after for found in self.components.values() for blocks in found)


def check(model: str, recipe: Recipe, revision: str | None = None) -> None:
    """VlmqError where the recipe cannot be meant for the model; its configuration is enough."""
    checkpoint = rotate(open_checkpoint(model, revision, weights=False), recipe.rotate)
    recipe.assign(ends.plan(checkpoint, checkpoint.skeleton(), recipe))


def inspect(model: str, recipe: Recipe, revision: str | None = None) -> Inspection:
    """Walk a demo, a folder (config.json is enough) or a Hub model, and apply the recipe to it on paper."""
    checkpoint = rotate(open_checkpoint(model, revision, weights=False), recipe.rotate)
    skeleton = checkpoint.skeleton()
    plan = ends.plan(checkpoint, skeleton, recipe)
    return inspection(checkpoint, skeleton, plan, recipe.assign(plan), recipe.rotate)


def inspection(
    checkpoint: Checkpoint, skeleton: nn.Module, plan: Walk, assignment: Assignment, rotated: tuple[str, ...] = ()
) -> Inspection:
    """What the assignment makes of the linears of the walk `plan`; the skeleton is the checkpoint's."""
    width = stored_dtype(checkpoint).itemsize
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    in_blocks = sum(site.rows * site.columns for site in plan.sites)
    components = {
        component: tuple(_grouped([block for block in plan.blocks if block.component == component], assignment, width))
        for component in COMPONENTS
    }
    elsewhere = (parameters - in_blocks) * width
    return Inspection(checkpoint.name, checkpoint.family.name, components, plan.kept, parameters, elsewhere, rotated)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of a checkpoint's weights: as stored, or as the configuration says, or half precision."""
    stored = next(iter(checkpoint.places), None)
    dtype = checkpoint.dtype(stored) if stored else checkpoint.config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float16


def _grouped(blocks: list[Block], assignment: Assignment, width: int) -> Iterator[Blocks]:
    linears = [
        tuple(_linear(site, block, assignment.schemes.get(site.name), assignment.kept, width) for site in block.sites)
        for block in blocks
    ]
    start = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or linears[end] != linears[start]:
            yield Blocks(blocks[start].name, end - start, linears[start])
            start = end


def _linear(site: Site, block: Block, scheme: Scheme | None, kept: dict[str, str], width: int) -> Linear:
    name = site.name.removeprefix(block.name).removeprefix(".") or site.name
    shape, before = (site.rows, site.columns), site.rows * site.columns * width
    if scheme is None:
        return Linear(name, shape, before, before, f"kept: {kept[site.name]}")
    plan = f"{scheme.method} {_words(scheme.grid, 'row')}"
    if scheme.inputs:
        plan += f", inputs {_words(scheme.inputs, 'token')}"
    if scheme.rows and sum(rows.stop - rows.start for rows in scheme.rows) < site.rows:
        return Linear(name, shape, before, before, f"{plan}, v alone; stored dense")
    after = compressed_tensors.packed_bytes(shape, scheme.grid.stored, width, scheme.inputs)
    return Linear(name, shape, before, after, plan)


def _words(grid: Grid, row: str) -> str:
    """`4-bit g128`, `8-bit per token`: a grid in words, with what a row of it is."""
    group = {ROW: f"per {row}", TENSOR: "per tensor"}.get(grid.group, f"g{grid.group}")
    return f"{grid.bits}-bit {group}{'' if grid.symmetric else ' asymmetric'}"
