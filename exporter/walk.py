"""The walk: reads a family's table against a model and says what every linear is.

Nothing is silently skipped (DESIGN.md, promise 1): each `nn.Linear` of the model is a site, or is kept for a
reason, and each line of the table matches something; otherwise the walk stops.
"""

from dataclasses import dataclass

from torch import nn

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import Component, Family, Kind, Reads, Stage


@dataclass(frozen=True)
class Site:
    """One linear to quantize."""

    name: str  # in memory
    component: Component
    block: int
    kind: Kind
    rows: int
    columns: int
    parts: tuple[str, ...] = ()  # names of the stacked parts of a fused projection, of equally many rows

    def part_rows(self, part: str | None) -> slice:
        """The rows of one stacked part, or all of them."""
        if part is None:
            return slice(0, self.rows)
        each = self.rows // len(self.parts)
        start = self.parts.index(part) * each
        return slice(start, start + each)


@dataclass(frozen=True)
class Source:
    """What can absorb the inverse of a scale before an input: a norm, or rows of a linear."""

    name: str
    rows: slice | None = None  # of a linear; None for a norm


@dataclass(frozen=True)
class Input:
    """One distinct input of a block and the linears that read it."""

    sites: tuple[Site, ...]
    source: Source | None


@dataclass(frozen=True)
class Block:
    """One repeated layer (or a module that is a block by itself); `hands_on` and `answers` are its stage's."""

    name: str
    component: Component
    index: int
    inputs: tuple[Input, ...]
    hands_on: tuple[str, ...] = ()
    answers: bool = False

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for entry in self.inputs for site in entry.sites)


@dataclass(frozen=True)
class Walk:
    """Every linear of a model: the blocks of each stage in the order they run, and what is kept, and why."""

    stages: tuple[tuple[Block, ...], ...]
    kept: dict[str, str]
    family: str = ""  # whose table was read

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for stage in self.stages for block in stage)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for block in self.blocks for site in block.sites)


def walk(model: nn.Module, family: Family) -> Walk:
    """Read the family's table against the model (which may be on the meta device)."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = {name: reason for name, reason in family.kept.items() if name in linears}
    stages = []
    for stage in family.stages:
        names = _block_names(model, stage)
        live = stage.live(model.config) if stage.live else len(names)
        for name in names[live:]:
            kept |= {linear: "its output is never read" for linear in linears if linear.startswith(f"{name}.")}
        blocks = tuple(_block(name, index, stage, linears) for index, name in enumerate(names[:live]))
        _check_table(stage, blocks)
        stages.append(blocks)
    found = Walk(tuple(stages), kept, family.name)
    missed = sorted(set(linears) - {site.name for site in found.sites} - set(kept))
    if missed:
        raise VlmqError(
            f"{missed[0]}: {len(missed)} linears are not in the table of family {family.name}; add them to families.py"
        )
    return found


def _block_names(model: nn.Module, stage: Stage) -> list[str]:
    if stage.single:
        return [stage.path]
    return [f"{stage.path}.{index}" for index in range(len(model.get_submodule(stage.path)))]  # type: ignore[arg-type]


def _block(name: str, index: int, stage: Stage, linears: dict[str, nn.Linear]) -> Block:
    def site(linear: str, entry: Reads) -> Site:
        full = _join(name, linear)
        rows, columns = linears[full].out_features, linears[full].in_features
        return Site(full, stage.component, index, entry.kind, rows, columns, stage.fused.get(linear, ()))

    by_name: dict[str, Site] = {}
    inputs = []
    for entry in stage.reads:
        if not any(_join(name, linear) in linears for linear in entry.linears):
            continue  # such as the cross-attention that only every other Q-Former block has
        sites = tuple(site(linear, entry) for linear in entry.linears)
        by_name |= {found.name: found for found in sites}
        inputs.append(Input(sites, _source(name, entry, by_name)))
    return Block(name, stage.component, index, tuple(inputs), stage.hands_on, stage.answers)


def _source(block: str, entry: Reads, sites: dict[str, Site]) -> Source | None:
    if entry.after is None:
        return None
    name = _join(block, entry.after)
    return Source(name, sites[name].part_rows(entry.part)) if name in sites else Source(name)


def _check_table(stage: Stage, blocks: tuple[Block, ...]) -> None:
    found = {site.name.removeprefix(block.name).removeprefix(".") for block in blocks for site in block.sites}
    for linear in (linear for entry in stage.reads for linear in entry.linears):
        if blocks and linear not in found:
            raise VlmqError(f"{stage.path}: the table's {linear} matches no linear; correct families.py")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if name else prefix
