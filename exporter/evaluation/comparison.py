"""Two results files of the same questions, side by side: what changed, and whether it is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.records import Record, Results
from vlmq.exporter.evaluation.statistics import McNemar, PairedDifference, in_words, mcnemar, paired_difference
from vlmq.exporter.evaluation.summary import grouped
from vlmq.exporter.evaluation.tasks.registry import task_of
from vlmq.exporter.evaluation.tasks.task import Task


@dataclass(frozen=True)
class Change:
    """One row: the reference's figure, this model's, their paired difference in the metric's own unit, and the word.

    mcnemar: of accuracies and recalls only; `only_first` is what only the reference got right.
    """

    name: str
    reference: float
    value: float
    difference: PairedDifference
    word: str
    mcnemar: McNemar | None


@dataclass(frozen=True)
class Comparison:
    """changes: overall first, then by group. metrics: name -> figures over both sets, which have no paired interval."""

    reference: str
    model: str
    task: str
    metric: str
    samples: int
    left_out: int  # samples that either model has no answer to
    same_answer: float  # share
    changes: tuple[Change, ...]
    metrics: dict[str, tuple[float, float]]


def compare(results: Results, reference: Results) -> Comparison:
    """VlmqError unless both answered the same questions of the same task."""
    task = task_of(results.header.task)
    _refuse_others(results, reference)
    known = {record.id: record for record in reference.answered}
    after = [record for record in results.answered if record.id in known]
    before = [known[record.id] for record in after]
    if not after:
        raise VlmqError(f"{results.header.model}: no sample was answered by both models; look at what failed")
    first, second = _scores(task, before), _scores(task, after)
    places = {name: [record.id for record in members] for name, members in grouped(task, after).items()}
    images = {record.id: record.image or record.id for record in after}
    said = {record.id: task.answer_of(record) for record in before}
    alike = sum(task.answer_of(record) == said[record.id] for record in after)
    return Comparison(
        reference=reference.header.model,
        model=results.header.model,
        task=task.name,
        metric=task.metric,
        samples=len(after),
        left_out=len(results.records) - len(after),
        same_answer=alike / len(after),
        changes=tuple(_change(task, name, ids, first, second, images) for name, ids in places.items()),
        metrics=_both(task, before, after),
    )


def _refuse_others(results: Results, reference: Results) -> None:
    one, other = results.header, reference.header
    if one.task != other.task:
        raise VlmqError(f"{other.model}: its results are of {other.task}, not {one.task}; compare the same task")
    asked = {record.id: (record.question, record.references) for record in results.answered}
    known = {record.id: (record.question, record.references) for record in reference.answered}
    if {record.id for record in results.records} != {record.id for record in reference.records}:
        raise VlmqError(f"{other.model}: its results are of other samples than {one.model}'s; compare the same ones")
    differing = next((id_ for id_ in asked if id_ in known and asked[id_] != known[id_]), None)
    if differing is not None:
        raise VlmqError(f"{other.model}: was asked otherwise about {differing}, or scored by other answers; ask alike")


def _scores(task: Task, records: Sequence[Record]) -> dict[str, float]:
    """Anew: a caption's score depends on which images it is scored with."""
    return dict(zip((record.id for record in records), task.score(records), strict=True))


def _change(
    task: Task,
    name: str,
    ids: Sequence[str],
    first: dict[str, float],
    second: dict[str, float],
    images: dict[str, str],
) -> Change:
    one, two = [first[id_] for id_ in ids], [second[id_] for id_ in ids]
    points = paired_difference(one, two, [images[id_] for id_ in ids])
    unit = task.scale / 100  # `points` are hundredths
    difference = PairedDifference(
        points.points * unit, points.low * unit, points.high * unit, points.samples, points.clusters
    )
    return Change(
        name=name,
        reference=task.scale * sum(one) / len(one),
        value=task.scale * sum(two) / len(two),
        difference=difference,
        word=in_words(points),
        mcnemar=mcnemar(one, two) if task.is_share else None,
    )


def _both(task: Task, before: Sequence[Record], after: Sequence[Record]) -> dict[str, tuple[float, float]]:
    first, second = ({metric.name: metric.value for metric in task.more(records)} for records in (before, after))
    return {
        name: (value, other)
        for name, value in first.items()
        if value is not None and (other := second[name]) is not None
    }
