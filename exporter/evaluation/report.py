"""A verdict as rows of text for a table, and as JSON for a program. Drawing the table is the command line's work."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from vlmq.exporter.evaluation.verify import BITS_WITH_MIN_COSINE, MIN_COSINE, Score, Side, Verdict

REPORT = "report.json"


@dataclass(frozen=True)
class Row:
    """One line of the table; what does not apply is empty."""

    label: str
    reference: str = ""
    export: str = ""
    difference: str = ""


def rows(verdict: Verdict) -> list[Row]:
    """Answers, then outputs, then what the two models take."""
    answered = [_accuracy(kind, score) for kind, score in verdict.accuracy.items()]
    agreed = Row("same greedy tokens", export=f"{100 * verdict.token_agreement:.1f} %")
    alike = [
        Row(f"cosine, {component} ({engine})", export=f"{value:.4f}")
        for engine, found in verdict.cosine.items()
        for component, value in found.items()
    ]
    return [*answered, agreed, *alike, *_sizes(verdict), *_times(verdict.reference, verdict.export)]


def criterion(verdict: Verdict) -> str:
    """What the verdict rests on, in words."""
    if verdict.accuracy:
        return f"a drop of up to {verdict.max_drop:g} points is allowed at {verdict.bits} bits"
    if verdict.bits < BITS_WITH_MIN_COSINE:
        return f"no answers to score, and at {verdict.bits} bits no cosine is demanded: look at the table"
    return f"no answers to score; each component's cosine to the reference must be at least {MIN_COSINE}"


def _accuracy(kind: str, score: Score) -> Row:
    change = score.difference
    return Row(
        f"accuracy, {kind} ({change.samples})",
        f"{score.reference:.2f} %",
        f"{score.export:.2f} %",
        f"{change.points:+.2f} ({change.low:+.2f} to {change.high:+.2f})",
    )


def _sizes(verdict: Verdict) -> list[Row]:
    before, after = verdict.reference, verdict.export
    source = before.disk["safetensors"]
    disk = [_smaller(f"weights on disk, {kind}", source, size) for kind, size in after.disk.items() if size]
    engines = f"{before.engine} / {after.engine}"
    return [
        *disk,
        _smaller(f"memory of the model ({engines})", before.memory.model, after.memory.model),
        _smaller(f"process after loading ({engines})", before.memory.loaded, after.memory.loaded),
        _smaller(f"process at its peak ({engines})", before.memory.peak, after.memory.peak),
    ]


def _smaller(label: str, before: int, after: int) -> Row:
    return Row(label, _megabytes(before), _megabytes(after), _ratio(before, after, "smaller", "larger"))


def _ratio(before: float, after: float, less: str, more: str) -> str:
    if before <= 0 or after <= 0:  # memory of a model too small to show
        return ""
    return f"{before / after:.2f} x {less}" if after <= before else f"{after / before:.2f} x {more}"


def _times(before: Side, after: Side) -> list[Row]:
    if before.seconds_per_answer is None or after.seconds_per_answer is None:
        return []
    first, second = before.seconds_per_answer, after.seconds_per_answer
    label = f"time per answer ({before.engine} / {after.engine})"
    return [Row(label, f"{1000 * first:.1f} ms", f"{1000 * second:.1f} ms", _ratio(first, second, "faster", "slower"))]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def as_dict(verdict: Verdict) -> dict[str, object]:
    """The verdict in values that JSON knows."""
    return {"ok": verdict.ok, **asdict(verdict)}


def write(verdict: Verdict, folder: Path) -> Path:
    """Write `report.json` into the folder and return its path."""
    path = folder / REPORT
    path.write_text(json.dumps(as_dict(verdict), indent=1) + "\n", encoding="utf-8")
    return path
