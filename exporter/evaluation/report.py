"""A verdict as rows of text for a table, and as JSON for a program; `page.py` makes a page of it.

Drawing the table is the command line's work.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

from vlmq.exporter.evaluation.likeness import Likeness
from vlmq.exporter.evaluation.speed import Speed
from vlmq.exporter.evaluation.thresholds import THRESHOLDS
from vlmq.exporter.evaluation.verify import Score, Side, Verdict

REPORT = "report.json"
PAGE = "report.html"


SAME_NAME = 2  # misses of one name that are told one by one


@dataclass(frozen=True)
class Row:
    """One line of the table; what does not apply is empty. threshold: the name of the one it is judged by."""

    label: str
    reference: str = ""
    export: str = ""
    difference: str = ""
    threshold: str = ""


def rows(verdict: Verdict) -> list[Row]:
    """Answers, then outputs, then what the models take."""
    answered = [_accuracy(kind, score) for kind, score in verdict.accuracy.items()]
    if verdict.export is not None:
        answered.append(Row("same greedy tokens", export=f"{100 * verdict.token_agreement:.1f} %"))
    alike = [row for engine, found in verdict.likeness.items() for row in _likeness(engine, found)]
    weights = [
        Row(f"tensors of the source found again ({kind})", export=str(count))
        for kind, count in verdict.compared.items()
    ]
    takes = [row for side in _sides(verdict) for row in (*_memory(verdict.reference, side), *_times(verdict, side))]
    return [*answered, *alike, *weights, *_sizes(verdict), *takes]


def brief(verdict: Verdict) -> list[Row]:
    """The rows that decide, of the engine that the folder is meant for, or of the other where that one failed."""
    shown = [_accuracy(kind, score) for kind, score in verdict.accuracy.items()]
    shown[:1] = [replace(row, threshold="max-drop") for row in shown[:1]]
    if verdict.export is not None:
        shown.append(Row("same greedy tokens", export=f"{100 * verdict.token_agreement:.1f} %", threshold="tokens"))
    side = next(iter(_sides(verdict)), None)
    if side is None:
        return shown
    if side.engine in verdict.likeness:
        shown += _closely(verdict, verdict.likeness[side.engine])
    kind = "onnx" if side.engine == "onnx" else "safetensors"
    takes = [
        _smaller("weights on disk", verdict.reference.disk["safetensors"], side.disk[kind]),
        *_memory(verdict.reference, side)[::2],
        *_times(verdict, side)[:2],
    ]
    return shown + [replace(row, label=row.label.partition(" (")[0]) for row in takes]


def _closely(verdict: Verdict, found: Likeness) -> list[Row]:
    """Divergence, the least cosine, and what other images change, each beside what is demanded."""

    def demanded(name: str) -> str:
        limit, threshold = verdict.thresholds.get(name), THRESHOLDS[name]
        return "" if limit is None else f"at {'most' if threshold.at_most else 'least'} {limit:g}"

    kl = f"{found.divergence.kl:.4f}"
    rows = [Row("divergence, nats a token", export=kl, difference=demanded("kl"), threshold="kl")]
    if found.cosine:
        least = min(found.cosine, key=lambda component: found.cosine[component])
        name, value = f"cosine-{least}", f"{found.cosine[least]:.4f}"
        rows.append(Row(f"least cosine, {least}", export=value, difference=demanded(name), threshold=name))
    for shown, (before, after) in found.sensitivity.items():
        change = f"{after - before:+.1f}"
        rows.append(Row(f"changed by {shown} images", f"{before:.1f} %", f"{after:.1f} %", change, "sensitivity"))
    return rows


def misses(verdict: Verdict) -> list[str]:
    """A line for each miss; of many under one name the first few, and how many more."""
    lines = []
    for name, members in groupby(sorted(verdict.misses, key=_name), _name):
        of = list(members)
        few = of if len(of) <= SAME_NAME + 1 else of[:SAME_NAME]
        lines += few
        if len(few) < len(of):
            lines.append(f"{name}: and {len(of) - len(few)} more, all in {REPORT}")
    return lines


def _name(miss: str) -> str:
    return miss.partition(":")[0]


def criterion(verdict: Verdict) -> str:
    """What the verdict rests on, in words."""
    demanded = sum(limit is not None for limit in verdict.thresholds.values())
    drop = verdict.thresholds["max-drop"]
    if verdict.accuracy and drop is not None:
        return f"a drop of up to {drop:g} points is allowed at {verdict.bits} bits, and {demanded - 1} more thresholds"
    return f"no answers to score; {demanded} thresholds at {verdict.bits} bits"


def _sides(verdict: Verdict) -> list[Side]:
    return [*([verdict.export] if verdict.export else []), *verdict.others]


def _accuracy(kind: str, score: Score) -> Row:
    change = score.difference
    return Row(
        f"accuracy, {kind} ({change.samples})",
        f"{score.reference:.2f} %",
        f"{score.export:.2f} %",
        f"{change.points:+.2f} ({change.low:+.2f} to {change.high:+.2f})",
    )


def _likeness(engine: str, found: Likeness) -> list[Row]:
    changes = [
        Row(
            f"answers that {shown} images change ({engine})",
            f"{before:.1f} %",
            f"{after:.1f} %",
            f"{after - before:+.1f}",
        )
        for shown, (before, after) in found.sensitivity.items()
    ]
    tokens = found.divergence
    return [
        Row(f"divergence, nats a token ({engine})", export=f"{tokens.kl:.4f}", difference=f"first {tokens.first:.4f}"),
        Row(f"likeliest token in both ({engine})", export=f"{tokens.top1:.1f} %", difference=f"of {tokens.tokens}"),
        *changes,
        *[
            Row(
                f"cosine, {component} ({engine})",
                export=f"{value:.4f}",
                difference=f"error {100 * found.error[component]:.1f} %",
            )
            for component, value in found.cosine.items()
        ],
    ]


def _sizes(verdict: Verdict) -> list[Row]:
    """Whole formats, then their components."""
    source = verdict.reference.disk["safetensors"]
    whole = verdict.export.disk if verdict.export else {}
    disk = [_smaller(f"weights on disk, {kind}", source, size) for kind, size in whole.items() if size]
    parts = [
        _smaller(f"of these {component} ({kind})", verdict.source_disk[component], size)
        if component in verdict.source_disk
        else Row(f"of these {component} ({kind})", export=megabytes(size))
        for kind, sizes in verdict.disk.items()
        for component, size in sorted(sizes.items())
    ]
    return [*disk, *parts]


def _memory(before: Side, after: Side) -> list[Row]:
    engines = f"{before.engine} / {after.engine}"
    return [
        _smaller(f"memory of the model ({engines})", before.memory.model, after.memory.model),
        _smaller(f"process after loading ({engines})", before.memory.loaded, after.memory.loaded),
        _smaller(f"process at its peak ({engines})", before.memory.peak, after.memory.peak),
    ]


def _smaller(label: str, before: int, after: int) -> Row:
    return Row(label, megabytes(before), megabytes(after), _ratio(before, after, "smaller", "larger"))


def _ratio(before: float, after: float, less: str, more: str) -> str:
    if before <= 0 or after <= 0:  # memory of a model too small to show
        return ""
    return f"{before / after:.2f} x {less}" if after <= before else f"{after / before:.2f} x {more}"


def _times(verdict: Verdict, after: Side) -> list[Row]:
    """Medians, and the median over pairs of how much faster."""
    before, found = verdict.reference, verdict.likeness.get(after.engine)
    if not (before.speed and after.speed and found):
        return []
    faster = found.faster
    engines = f"({before.engine} / {after.engine})"

    def row(label: str, kind: str, show: str, scale: float = 1.0) -> Row:
        one, two = (scale * getattr(speed, label) for speed in (before.speed, after.speed))
        return Row(kind, show.format(one), show.format(two), _ratio(faster[KINDS[label]], 1.0, "faster", "slower"))

    return [
        row("seconds_per_answer", f"time per answer {engines}", "{:.1f} ms", 1000),
        row("seconds_to_first_token", f"time to first token {engines}", "{:.1f} ms", 1000),
        row("tokens_per_second", f"further tokens {engines}", "{:.0f} a second"),
        row("images_per_second", f"images {engines}", "{:.0f} a second"),
    ]


KINDS = {
    "seconds_per_answer": "answer",
    "seconds_to_first_token": "first_token",
    "tokens_per_second": "token",
    "images_per_second": "image",
}


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def as_dict(verdict: Verdict) -> dict[str, object]:
    """The verdict in values that JSON knows; medians instead of all seconds."""
    content = asdict(verdict)
    for side in (content["reference"], content["export"], *content["others"]):
        if side and side["speed"]:
            side["speed"] = _medians(Speed(**side["speed"]))
    return {"ok": verdict.ok, **content}


def _medians(speed: Speed) -> dict[str, float]:
    return {label: getattr(speed, label) for label in KINDS}


def write(verdict: Verdict, folder: Path) -> Path:
    """Write `report.json` and `report.html` into the folder, and return the path of the first."""
    from vlmq.exporter.evaluation import page  # matplotlib and jinja2, which only whoever writes a page needs

    path = folder / REPORT
    path.write_text(json.dumps(as_dict(verdict), indent=1) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(page.render(verdict, rows(verdict), THRESHOLDS), encoding="utf-8")
    return path
