"""Rows of results/methods.jsonl put together over their seeds, and the differences between such cells.

Intervals are of 95 % and resample images, as `paired_difference` does; the answers about an image stay together. They
say how sure a figure is for other pictures, with these three draws of calibration samples and outliers.
"""

from __future__ import annotations

from base64 import b64decode
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import common
import numpy as np
from configurations import REFERENCE, SEEDS, Configuration, Row, once

from vlmq.exporter.evaluation.statistics import LEVEL, RESAMPLES
from vlmq.formats import json_lines

Kept = dict[str, Any]


def read(file: Path) -> dict[Row, Kept]:
    """Every row's last line; one that was cut short is left out, and its row measured anew."""
    found = {}
    for kept in json_lines.read(file):
        fields = ("method", "weights", "inputs", "granularity", "components")
        configuration = Configuration(**{field: kept[field] for field in fields})
        found[Row(kept["checkpoint"], kept["variant"], kept["seed"], configuration)] = kept
    return found


@cache
def images() -> tuple[int, ...]:
    """The image of each question, by number."""
    numbers: dict[object, int] = {}
    return tuple(numbers.setdefault(sample.image, len(numbers)) for sample in common.some_questions())


@dataclass(frozen=True)
class Interval:
    """A mean, and where it lies with 95 % confidence."""

    points: float
    low: float
    high: float


def interval(by_image: np.ndarray) -> Interval:
    """Of a figure of each image (images,), all of which have as many questions.

    What `paired_difference` finds, from images drawn once for all of a report's many differences.
    """
    means = _draws(len(by_image)) @ by_image / len(by_image)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(by_image.mean()), float(low), float(high))


@cache
def _draws(count: int) -> np.ndarray:
    """(RESAMPLES, count): how often each image is drawn."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(float)


@dataclass(frozen=True, eq=False)
class Cell:
    """A configuration on a checkpoint and variant, with the row of every seed that was measured."""

    checkpoint: str
    variant: str
    configuration: Configuration
    rows: dict[int, Kept]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those it stands for: all, where one row holds for all."""
        return SEEDS if once(self.variant, self.configuration) else tuple(sorted(self.rows))

    def _at(self, seed: int) -> Kept:
        return self.rows[SEEDS[0]] if once(self.variant, self.configuration) else self.rows[seed]

    def right(self, seeds: tuple[int, ...]) -> np.ndarray:
        """(seeds * questions,) bool."""
        kept = [np.frombuffer(b64decode(self._at(seed)["right"]), np.uint8) for seed in seeds]
        return np.concatenate([np.unpackbits(bits, count=len(images())) for bits in kept]).astype(bool)

    def by_image(self, seeds: tuple[int, ...]) -> np.ndarray:
        """(seeds * images,): the divergences."""
        return np.concatenate(
            [np.frombuffer(b64decode(self._at(seed)["divergences"]), np.float16) for seed in seeds]
        ).astype(float)

    def mean(self, figure: str) -> float:
        return float(np.mean([row[figure] for row in self.rows.values()]))

    @cached_property
    def accuracy(self) -> Interval:
        return interval(_per_image(self.right(tuple(sorted(self.rows)))))

    def against(self, other: Cell) -> Interval | None:
        """The points this one is better than another, on the seeds that both have."""
        seeds = tuple(seed for seed in self.seeds if seed in other.seeds)
        return interval(_per_image(self.right(seeds)) - _per_image(other.right(seeds))) if seeds else None

    def divergence_against(self, other: Cell) -> Interval | None:
        """The nats by which this one's logits are further from the reference than another's; negative is better."""
        seeds = tuple(seed for seed in self.seeds if seed in other.seeds)
        if not seeds:
            return None
        differences = self.by_image(seeds) - other.by_image(seeds)
        return interval(differences.reshape(len(seeds), -1).mean(0))


def _per_image(right: np.ndarray) -> np.ndarray:
    """(seeds * questions,)  ->  (images,): the mean over an image's questions and the seeds, in points."""
    numbers = np.tile(images(), len(right) // len(images()))
    return 100 * np.bincount(numbers, right) / np.bincount(numbers)


class Cells:
    """Every cell that has a row, by what it is; refused rows apart."""

    def __init__(self, kept: dict[Row, Kept]) -> None:
        grouped: dict[tuple[str, str, Configuration], dict[int, Kept]] = defaultdict(dict)
        self.refused: dict[tuple[str, str, Configuration], str] = {}
        for row, figures in kept.items():
            key = (row.checkpoint, row.variant, row.configuration)
            if "refused" in figures:
                self.refused[key] = figures["refused"]
            else:
                grouped[key][row.seed] = figures
        self._cells = {key: Cell(*key, dict(sorted(found.items()))) for key, found in grouped.items()}

    def get(self, checkpoint: str, variant: str, configuration: Configuration) -> Cell | None:
        return self._cells.get((checkpoint, variant, configuration))

    def reference(self, checkpoint: str, variant: str) -> Cell | None:
        return self.get(checkpoint, variant, REFERENCE)

    def of(self, checkpoint: str, variant: str) -> list[Cell]:
        return [cell for (one, other, _), cell in self._cells.items() if (one, other) == (checkpoint, variant)]
