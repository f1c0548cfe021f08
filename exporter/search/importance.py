"""Which component's bits matter: shares of a score's variation, with how sure they are (paper 002, section 4).

A table of scores goes in; shares by impurity, permutation and SHAP, their consensus, intervals and plots come out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.progress import Progress, silent
from vlmq.exporter.search.scores import Scores, read_scores
from vlmq.formats.folder import staged

MEASURES = ("impurity", "permutation", "shap", "consensus")
REPORT = "importance.json"
TARGET = "CIDEr"
TREES = 100
SEEDS = 10  # forests that show how much of a share is the seed's doing
RESAMPLES = 100  # (4.1)
RESAMPLED_TREES = 25  # the interval's ends differ by less than 0.3 points from those of 100 trees: rows decide
FEW_ROWS = 50  # all assignments of seven widths to two components are 49
LITTLE = 0.5  # of the variance


@dataclass(frozen=True)
class Share:
    """A component's part, in percent: by the first forest, in a 95 % interval over rows, and over other seeds."""

    percent: float
    low: float
    high: float
    least: float
    most: float


@dataclass(frozen=True)
class Importance:
    """What a table of scores says. shares: measure -> component -> share; explained: out-of-bag R^2, at most 1."""

    name: str
    file: str
    target: str
    rows: int
    explained: float
    shares: dict[str, dict[str, Share]]
    warnings: tuple[str, ...]


def analyse(
    files: Sequence[Path],
    target: str = TARGET,
    output: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Importance]:
    """Measure each table and, where `output` names a folder, write `importance.json` and the plots into it.

    VlmqError or FormatError, in one line and with nothing written, where a table or the folder cannot be used.
    """
    tables = [read_scores(file, target) for file in files]
    if output is None:
        return _measured(tables, seed, progress)
    with staged(output) as folder:
        found = _measured(tables, seed, progress)
        content = {"seed": seed, "tables": [asdict(importance) for importance in found]}
        (folder / REPORT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        from vlmq.exporter.search.plots import draw

        draw(found, folder)
    return found


def _measured(tables: Sequence[Scores], seed: int, progress: Progress) -> list[Importance]:
    stems = [table.file.stem for table in tables]
    names = stems if len(set(stems)) == len(stems) else [str(table.file.with_suffix("")) for table in tables]
    return [measure(table, name, seed, progress) for table, name in zip(tables, names, strict=True)]


def measure(scores: Scores, name: str, seed: int = 0, progress: Progress = silent) -> Importance:
    """Shares of one table, the same for the same seed. VlmqError where the extra is absent, or no bits matter."""
    try:
        from vlmq.exporter.search.forest import grow, shares
    except ImportError as error:
        raise VlmqError(
            f"importance: needs packages that are not here ({error}); run `pip install 'vlmq[search]'`"
        ) from error
    generator = np.random.default_rng(seed)
    rows, steps = len(scores.values), SEEDS + RESAMPLES

    by_seed, explained = [], []
    for number in range(SEEDS):
        progress(name, number, steps)
        drawn = int(generator.integers(2**31))
        forest = grow(scores.bits, scores.values, TREES, drawn, judged=True)
        explained.append(float(forest.oob_score_))
        by_seed.append(shares(forest, scores.bits, scores.values, drawn))
    if np.isnan(by_seed[0]).any():
        raise VlmqError(f"{scores.file}: {scores.target} depends on no bits here; choose another --target")

    by_resample = []
    for number in range(RESAMPLES):
        progress(name, SEEDS + number, steps)
        chosen = generator.integers(rows, size=rows)
        drawn = int(generator.integers(2**31))
        bits, values = scores.bits[chosen], scores.values[chosen]
        by_resample.append(shares(grow(bits, values, RESAMPLED_TREES, drawn), bits, values, drawn))
    progress(name, steps, steps)

    return Importance(
        name=name,
        file=str(scores.file),
        target=scores.target,
        rows=rows,
        explained=explained[0],
        shares=_table(scores.components, np.array(by_seed), np.array(by_resample)),
        warnings=_warnings(scores, explained[0]),
    )


def _table(components: Sequence[str], by_seed: np.ndarray, by_resample: np.ndarray) -> dict[str, dict[str, Share]]:
    """by_seed (seeds, measures, components), by_resample (resamples, measures, components)  ->  shares."""
    low, high = np.nanquantile(by_resample, (0.025, 0.975), axis=0)  # NaN: a resample in which nothing varied
    columns = np.stack([by_seed[0], low, high, np.nanmin(by_seed, axis=0), np.nanmax(by_seed, axis=0)], axis=-1)
    return {
        measure: {component: Share(*share.tolist()) for component, share in zip(components, found, strict=True)}
        for measure, found in zip(MEASURES, columns, strict=True)
    }


def _warnings(scores: Scores, explained: float) -> tuple[str, ...]:
    rows = len(scores.values)
    few = [f"{rows} rows are few: trust the intervals, not the shares"] if rows < FEW_ROWS else []
    little = (
        [f"the forest explains little of {scores.target} (out-of-bag R^2 {explained:.2f}): shares may be of noise"]
        if not explained >= LITTLE
        else []
    )
    still = [
        f"{component} has the same bits in every row, so its share is 0"
        for component, varies in zip(scores.components, np.ptp(scores.bits, axis=0), strict=True)
        if not varies
    ]
    return tuple(f"{scores.file}: {warning}" for warning in (*few, *little, *still))
