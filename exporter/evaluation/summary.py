"""The table of one results file: the task's metric overall and by group, further metrics, and odd answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.odd import Odd, odd
from vlmq.exporter.evaluation.records import Record, Results
from vlmq.exporter.evaluation.tasks.registry import task_of
from vlmq.exporter.evaluation.tasks.task import Metric, Task

OVERALL = "overall"


@dataclass(frozen=True)
class Group:
    """The mean of the task's metric over some of the samples, as papers print it."""

    name: str
    samples: int
    value: float


@dataclass(frozen=True)
class Summary:
    model: str
    engine: str
    task: str
    metric: str
    groups: tuple[Group, ...]  # overall first
    metrics: tuple[Metric, ...]
    odd: Odd


def scored(task: Task, records: Sequence[Record]) -> list[Record]:
    """The records with the scores of those that were answered."""
    answered = [record for record in records if record.failed is None]
    scores = dict(zip((record.id for record in answered), task.score(answered), strict=True)) if answered else {}
    return [record.model_copy(update={"score": scores.get(record.id)}) for record in records]


def summarise(results: Results) -> Summary:
    """VlmqError where nothing was answered."""
    task, records = task_of(results.header.task), results.answered
    if not records:
        first = next((record.failed for record in results.records if record.failed), "no samples")
        raise VlmqError(f"{results.header.data}: not one sample could be answered; the first: {first}")
    return Summary(
        model=results.header.model,
        engine=results.header.engine,
        task=task.name,
        metric=task.metric,
        groups=tuple(
            Group(name, len(members), task.scale * sum(record.score or 0.0 for record in members) / len(members))
            for name, members in grouped(task, records).items()
        ),
        metrics=tuple(task.more(records)),
        odd=odd(task, results.records),
    )


def grouped(task: Task, records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each row of the task's table: all, then the groups in the task's order, then others by name."""
    present = {group for record in records for group in record.groups}
    order = [name for name in task.order if name in present] + sorted(present.difference(task.order))
    members: dict[str, list[Record]] = {OVERALL: list(records), **{name: [] for name in order}}
    for record in records:
        for name in record.groups:
            members[name].append(record)
    return members
