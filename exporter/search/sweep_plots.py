"""Plots of a sweep, of the kinds of paper 002: score against size with its front (Figure 4), each component by itself
(Figure 5), and what was quantized at all, by component, kind of linear and block group, with stars for all of it
(Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlmq.exporter.families import COMPONENTS
from vlmq.exporter.search.plots import INK, PALETTE, legend

if TYPE_CHECKING:
    from vlmq.exporter.search.tables import Row

FULL = 16
PARETO, ALONE, PARTS = "pareto.png", "alone.png", "parts.png"
MARKS = "osD^vP"
ORDER = (*COMPONENTS, "attention", "feedforward", "front", "middle", "end")  # in which subsets are named
DIVERGENCE = "divergence"
UNITS = {"accuracy": "accuracy, %", DIVERGENCE: "divergence from the reference, nats"}
MANY = (*PALETTE, "#8c564b", "#17a0b0", "#c8632f", "#4d6a2f")  # of subsets there are seven


def draw(rows: Sequence[Row], folder: Path) -> tuple[str, ...]:
    """Write those of the plots that the rows have something for; the same rows give the same bytes."""
    figures = {PARETO: pareto(rows), ALONE: alone(rows), PARTS: parts(rows)}
    for name, figure in figures.items():
        if figure:
            figure.savefig(folder / name, dpi=160, metadata={"Software": None})
    return tuple(name for name, figure in figures.items() if figure)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (size, score) that no other beats: none is as small with a higher score, or smaller with as high."""
    found: list[tuple[float, float]] = []
    for size, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or score > found[-1][1]:
            found.append((size, score))
    return found


def pareto(rows: Sequence[Row]) -> Figure:
    """Score against size, a colour for each series, each with its front (Figure 4); and so the divergence, where there
    is one: it still falls where scores do not rise."""
    score = next(iter(rows[0].scores))
    changed = any(row.scores.get(DIVERGENCE, 0) > 0 for row in rows)
    figure = Figure(figsize=(13.2 if changed else 7.2, 4.6), layout="constrained")
    axes = figure.subplots(1, 2 if changed else 1, squeeze=False)[0]
    _against_size(axes[0], rows, score, 1)
    if changed:
        _against_size(axes[1], rows, DIVERGENCE, -1)
        axes[1].set_yscale("log")
    for row in rows:
        if all(bits == FULL for bits in row.bits.values()):
            axes[0].axhline(row.scores[score], color=INK, linewidth=0.8, linestyle=":", label="reference")
            break
    legend(figure, axes[0])
    return figure


def _against_size(axis: Axes, rows: Sequence[Row], name: str, sign: int) -> None:
    """sign: 1 where more is better, -1 where less is."""
    for number, series in enumerate(dict.fromkeys(row.series for row in rows)):
        points = [(row.bytes / 1e6, row.scores[name]) for row in rows if row.series == series]
        if name == DIVERGENCE:
            points = [(size, score) for size, score in points if score > 0]  # zero has no logarithm
        if not points:
            continue
        best = [(size, sign * score) for size, score in front([(size, sign * score) for size, score in points])]
        colour, mark = PALETTE[number % len(PALETTE)], MARKS[number % len(MARKS)]
        sizes, scores = zip(*points, strict=True)
        axis.scatter(sizes, scores, s=16, alpha=0.35, color=colour, marker=mark, linewidths=0)
        axis.plot(*zip(*best, strict=True), color=colour, marker=mark, markersize=4, label=series)
    _finish(
        axis, f"{name} against size, and what no smaller one of a series beats", "MB of weights", UNITS.get(name, name)
    )


def alone(rows: Sequence[Row]) -> Figure | None:
    """A panel for each series: what the bits of one component do while all others are left alone (Figure 5)."""
    score = next(iter(rows[0].scores))
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        changed = [component for component, bits in row.bits.items() if bits != FULL]
        if len(changed) == 1 and not (row.recipe or {}).get("rules"):
            lines = panels.setdefault(row.series, {})
            lines.setdefault(changed[0], []).append((row.bits[changed[0]], row.scores[score]))
    panels = {series: lines for series, lines in panels.items() if any(len(line) > 1 for line in lines.values())}
    if not panels:
        return None
    figure = Figure(figsize=(1 + 4.2 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, (series, lines) in zip(axes.flat, panels.items(), strict=True):
        for number, component in enumerate(component for component in rows[0].bits if component in lines):
            points = zip(*sorted(lines[component]), strict=True)
            axis.plot(*points, color=PALETTE[number], marker=MARKS[number], markersize=4, label=component)
        _finish(axis, f"{series}, one component at a time", "bits", UNITS.get(score, score))
    legend(figure, axes[0, 0])
    return figure


def parts(rows: Sequence[Row]) -> Figure | None:
    """Score, and divergence, against size by the components, kinds and block groups that were quantized (Figure 3)."""
    ruled = [row for row in rows if row.recipe and all("blocks" in rule for rule in row.recipe.get("rules", ()))]
    ruled = [row for row in ruled if row.recipe and row.recipe.get("rules")]
    if not ruled:
        return None
    score = next(iter(rows[0].scores))
    names = [score, *([DIVERGENCE] if any(row.scores.get(DIVERGENCE, 0) > 0 for row in ruled) else [])]
    figure = Figure(figsize=(14, 4.4 * len(names)), layout="constrained")
    for name, axes in zip(names, figure.subplots(len(names), 3, sharey="row", squeeze=False), strict=True):
        for axis, key in zip(axes, ("component", "kind", "blocks"), strict=True):
            _by(axis, rows, ruled, key, name)
    return figure


def _by(axis: Axes, rows: Sequence[Row], ruled: Sequence[Row], key: str, name: str) -> None:
    """A colour for each subset of components, kinds or block groups; stars where all of the model has equal bits."""
    shown = [row for row in ruled if name != DIVERGENCE or row.scores[name] > 0]  # zero has no logarithm
    labels = sorted({_said(row, key) for row in shown}, key=lambda label: (label.count("+"), label))
    for number, label in enumerate(labels):
        points = [(row.bytes / 1e6, row.scores[name]) for row in shown if _said(row, key) == label]
        sizes, scores = zip(*points, strict=True)
        axis.scatter(sizes, scores, s=14, alpha=0.7, color=MANY[number % len(MANY)], linewidths=0, label=label)
    for row in rows:
        if len(set(row.bits.values())) == 1 and (name != DIVERGENCE or row.scores[name] > 0):
            place, bits = (row.bytes / 1e6, row.scores[name]), next(iter(row.bits.values()))
            axis.scatter(*place, marker="*", s=90, color=INK, linewidths=0, zorder=3)
            axis.annotate(f"{bits:g}", place, (5, 3), textcoords="offset points", fontsize=8, color=INK)
    if name == DIVERGENCE:
        axis.set_yscale("log")
    _finish(axis, f"by {key}; stars: all of it, at so many bits", "MB of weights", UNITS.get(name, name))
    axis.legend(fontsize=7, frameon=False, labelcolor=INK)


def _said(row: Row, key: str) -> str:
    """What a row's rules have under a key, joined. A projection goes with the feed-forward linears, as in the grid."""
    said = {rule[key].replace("projection", "feedforward") for rule in (row.recipe or {})["rules"]}
    return "+".join(sorted(said, key=ORDER.index))


def _finish(axis: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axis.set_xlabel(xlabel, color=INK)
    axis.set_ylabel(ylabel, color=INK)
    axis.grid(color="#e3e7ec")
    axis.set_axisbelow(True)
    axis.tick_params(length=0, colors=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#9aa5b1")
