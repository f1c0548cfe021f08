"""A few samples for a person to look at: question, picture, what both models answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmq.exporter.evaluation.measure import Measurement
from vlmq.exporter.samples import Sample

COUNT = 10
DIFFERING = 5  # of them at most, where the two models differ


@dataclass(frozen=True)
class Example:
    id: str
    image: str  # path
    question: str
    annotated: str  # what most annotators answered; empty where none did
    reference: str
    export: str


def examples(samples: Sequence[Sample], before: Measurement, after: Measurement) -> tuple[Example, ...]:
    """Some whose answers differ, then some about other images whose answers agree, in the order of the samples."""
    differing = [place for place in range(len(samples)) if before.texts[place] != after.texts[place]]
    chosen = _distinct(samples, differing, set())[:DIFFERING]
    seen = {samples[place].image for place in chosen}
    agreeing = [place for place in range(len(samples)) if before.texts[place] == after.texts[place]]
    spread = agreeing[:: max(1, len(agreeing) // (4 * COUNT))]
    chosen += _distinct(samples, [*spread, *agreeing], seen)[: COUNT - len(chosen)]
    return tuple(_example(samples[place], before.texts[place], after.texts[place]) for place in chosen)


def _distinct(samples: Sequence[Sample], places: Sequence[int], seen: set) -> list[int]:
    """The first place of every image that was not seen."""
    first: dict[object, int] = {}
    for place in places:
        if samples[place].image not in seen:
            first.setdefault(samples[place].image, place)
    return list(first.values())


def _example(sample: Sample, before: str, after: str) -> Example:
    annotated = max(sample.answers, key=sample.answers.count) if sample.answers else ""
    return Example(sample.id, str(sample.image), sample.text or "", annotated, before, after)
