"""Summaries and comparisons as rows of text for a table, and as JSON for a program. The command line draws them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vlmq.exporter.evaluation.comparison import Change, Comparison
from vlmq.exporter.evaluation.odd import in_words
from vlmq.exporter.evaluation.summary import Summary
from vlmq.exporter.evaluation.tasks.registry import task_of

Row = tuple[str, ...]


def summary_rows(found: Summary) -> list[Row]:
    """Name, samples, value."""
    unit = _unit(task_of(found.task).is_share)
    rows: list[Row] = [
        (_label(found.metric, group.name), f"{group.samples}", unit.format(group.value)) for group in found.groups
    ]
    for metric in found.metrics:
        value = "-" if metric.value is None else _unit(metric.is_share).format(metric.value)
        rows.append((metric.name, "", value))
    return rows


def summary_notes(found: Summary) -> list[str]:
    """What is odd about the answers, and why a figure is not there."""
    absent = [f"{metric.name}: {metric.note}" for metric in found.metrics if metric.value is None]
    return [*in_words(found.odd, task_of(found.task)), *absent]


def comparison_rows(found: Comparison) -> list[Row]:
    """Name, reference, this model, difference with its interval, McNemar's test, the word."""
    is_share = task_of(found.task).is_share
    unit = _unit(is_share)
    rows: list[Row] = [
        (
            f"{_label(found.metric, change.name)} ({change.difference.samples})",
            unit.format(change.reference),
            unit.format(change.value),
            _difference(is_share, change),
            _mcnemar(change),
            change.word,
        )
        for change in found.changes
    ]
    for name, (before, after) in found.metrics.items():
        rows.append((name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}", "", ""))
    return rows


def verdict(found: Comparison) -> str:
    """The overall row in a sentence."""
    overall = found.changes[0]
    sentence = {
        "no difference": "every score is the same",
        "within noise": "the difference is within noise",
        "better, beyond noise": "better than the reference, beyond noise",
        "worse, beyond noise": "worse than the reference, beyond noise",
    }.get(overall.word, overall.word)
    left_out = f"; {found.left_out} samples that failed are left out" if found.left_out else ""
    return f"{sentence}; {100 * found.same_answer:.1f} % of the answers are the same{left_out}"


def as_dict(summary: Summary | None, comparison: Comparison | None) -> dict[str, Any]:
    return {
        "results": summary and {**asdict(summary), "notes": summary_notes(summary)},
        "against": comparison and {**asdict(comparison), "verdict": verdict(comparison)},
    }


def _label(metric: str, group: str) -> str:
    return metric if metric == "CIDEr" and group == "overall" else f"{metric}, {group}"


def _unit(is_share: bool) -> str:
    return "{:.2f} %" if is_share else "{:.4f}"


def _difference(is_share: bool, change: Change) -> str:
    found = change.difference
    figure = "{:+.2f} ({:+.2f} to {:+.2f})" if is_share else "{:+.4f} ({:+.4f} to {:+.4f})"
    return figure.format(found.points, found.low, found.high)


def _mcnemar(change: Change) -> str:
    if change.mcnemar is None:
        return ""
    return f"{change.mcnemar.only_first} : {change.mcnemar.only_second}, p {change.mcnemar.p:.2g}"
