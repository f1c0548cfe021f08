"""The plan of an export: what will become of each component, what it will take, and whether this machine has it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.memory import resident
from vlmq.exporter.families import COMPONENTS
from vlmq.exporter.inspection import inspection
from vlmq.exporter.journal import left_behind
from vlmq.exporter.planning import disk, machine, memory
from vlmq.exporter.planning.workload import Need, Workload
from vlmq.exporter.settings import FULL


@dataclass(frozen=True)
class ComponentPlan:
    """How many linears a component's blocks have, the bits they get (16: left alone), their bytes before and after."""

    linears: int
    bits: tuple[int, ...]
    before: int
    after: int


@dataclass(frozen=True)
class Plan:
    """What an export will make and need, in bytes.

    elsewhere: of all that is no linear of a block. memory, disk: what its steps hold. activations: what all samples
    have between blocks, wherever it lies. available_memory, free_disk: what this machine has, now.
    """

    model: str
    family: str
    parameters: int
    components: dict[str, ComponentPlan]
    elsewhere: int
    before: int
    after: int
    memory: tuple[Need, ...]
    disk: tuple[Need, ...]
    activations: int
    available_memory: int
    free_disk: int

    @property
    def peak(self) -> Need:
        """The step that needs the most memory."""
        return max(self.memory, key=lambda need: need.bytes)

    @property
    def refusals(self) -> tuple[str, ...]:
        """A line for each step that this machine cannot do: where, what, remedy."""
        return (
            *self._refused(self.disk, "disk", self.free_disk),
            *self._refused(self.memory, "memory", self.available_memory),
        )

    def _refused(self, needs: Iterable[Need], what: str, there: int) -> Iterable[str]:
        for need in needs:
            if need.bytes > there:
                most = max(need.parts, key=lambda part: part.bytes)
                yield (
                    f"{self.model}: {need.step} needs {need.bytes / 1e9:,.2f} GB of {what} "
                    f"({most.name}: {most.bytes / 1e9:,.2f} GB), and {there / 1e9:,.2f} GB are free; {need.remedy}"
                )


def plan(work: Workload, output: Path) -> Plan:
    """What the export of `work` to `output` will make and need; nothing is read or computed."""
    found = inspection(work.checkpoint, work.skeleton, work.walk, work.assignment)
    return Plan(
        model=found.model,
        family=found.family,
        parameters=found.parameters,
        components={
            component: ComponentPlan(
                linears=sum(len(block.sites) for block in work.walk.blocks if block.component == component),
                bits=_bits(work, component),
                before=sum(blocks.before for blocks in found.components[component]),
                after=sum(blocks.after for blocks in found.components[component]),
            )
            for component in COMPONENTS
        },
        elsewhere=found.elsewhere,
        before=found.before,
        after=found.after,
        memory=memory.needs(work, resident()),
        disk=disk.needs(work),
        activations=work.activations,
        available_memory=machine.available_memory(),
        free_disk=machine.free_disk(output) + left_behind(output),
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, with the sums that it computes."""

    def needs(found: Iterable[Need]) -> list[dict[str, Any]]:
        return [asdict(need) | {"bytes": need.bytes} for need in found]

    sums = {"memory": needs(plan.memory), "disk": needs(plan.disk), "peak_memory": plan.peak.bytes}
    return asdict(plan) | sums | {"refusals": list(plan.refusals)}


def refuse(plan: Plan) -> None:
    """VlmqError for the first step that this machine cannot do."""
    if plan.refusals:
        raise VlmqError(plan.refusals[0])


def _bits(work: Workload, component: str) -> tuple[int, ...]:
    schemes = work.assignment.schemes
    sites = [site for site in work.walk.sites if site.component == component]
    return tuple(sorted({schemes[site.name].grid.bits if site.name in schemes else FULL for site in sites}))
