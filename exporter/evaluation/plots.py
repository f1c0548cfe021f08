"""The two plots of a verdict: accuracy against memory, and the error of every block."""

from __future__ import annotations

import io
from itertools import groupby

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlmq.exporter.evaluation.expected import component_of
from vlmq.exporter.evaluation.verify import Side, Verdict

INK, PALE, GRID = "#22303f", "#9aa5b1", "#e3e7ec"
PALETTE = ("#22303f", "#3b6fb6", "#e0a030", "#5a9e6f", "#b0413e")  # overall, then by answer type
COMPONENTS = {"vision": "#3b6fb6", "connector": "#e0a030", "language": "#5a9e6f"}


def accuracy(verdict: Verdict) -> Figure | None:
    """Accuracy against the bytes on disk and against the peak of the process: a line from reference to export for each
    answer type, the export's with the interval of the difference. None where nothing was scored."""
    if not verdict.accuracy or verdict.export is None:
        return None
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    before, after = verdict.reference, verdict.export
    _lines(left, verdict, _on_disk(before), _on_disk(after))
    _finish(left, "Accuracy against weights on disk", "MB", "accuracy, %")
    _lines(right, verdict, before.memory.peak / 1e6, after.memory.peak / 1e6)
    _finish(right, "Accuracy against the process at its peak", "MB", "")
    low, high = left.get_ylim()
    left.set_ylim(max(0, low), min(high, 101))  # percent
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    return figure


def _on_disk(side: Side) -> float:
    return (side.disk["onnx" if side.engine == "onnx" else "safetensors"] or side.disk["safetensors"]) / 1e6


def _lines(axis: Axes, verdict: Verdict, before: float, after: float) -> None:
    for number, (kind, score) in enumerate(verdict.accuracy.items()):
        colour = PALETTE[number % len(PALETTE)]
        change = score.difference
        below, above = score.export - (score.reference + change.low), score.reference + change.high - score.export
        # Intervals of several types at one place would hide each other.
        shift = (number - (len(verdict.accuracy) - 1) / 2) * 0.012 * abs(before - after)
        places = [after + shift, before + shift]
        axis.plot(places, [score.export, score.reference], color=colour, lw=2 if number == 0 else 1.2, zorder=2)
        axis.plot(places[1:], [score.reference], "o", mfc="white", mec=colour, ms=7, zorder=4)
        axis.errorbar(
            places[:1],
            [score.export],
            [[max(0, below)], [max(0, above)]],
            fmt="o",
            color=colour,
            ms=7,
            capsize=3,
            elinewidth=1,
            label=kind,
            zorder=3,
        )
    for place, what in ((before, f"reference\n{before:,.1f} MB"), (after, f"export\n{after:,.1f} MB")):
        at_foot = axis.get_xaxis_transform()  # x as data, y as a share of the axis
        axis.annotate(what, (place, 0.03), xycoords=at_foot, ha="center", va="bottom", fontsize=8, color=INK)
    span = abs(before - after) or before
    axis.set_xlim(max(0, min(before, after) - 0.25 * span), max(before, after) + 0.25 * span)
    axis.margins(y=0.25)


def blocks(verdict: Verdict) -> Figure | None:
    """Relative error of each block's weights (bars) and of what it puts out (line), in the order they run."""
    weights: dict[str, float] = next(iter(verdict.weights.values()), {})
    outputs: dict[str, float] = next((found.blocks for found in verdict.likeness.values() if found.blocks), {})
    names = list(weights)
    names += [name for name in outputs if name not in weights]
    if not names:
        return None
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    axis = figure.add_subplot()
    order = list(COMPONENTS)
    names.sort(key=lambda name: order.index(component_of(f"{name}.")))  # stable: within a component as they run
    for component, members in groupby(names, lambda name: component_of(f"{name}.")):
        of = list(members)
        places = [names.index(name) for name in of]
        colour = COMPONENTS[component]
        heights = [100 * weights.get(name, 0.0) for name in of]
        axis.bar(places, heights, 0.72, color=colour, alpha=0.45, label=f"{component}, weights", zorder=2)
        seen = [(place, 100 * outputs[name]) for place, name in zip(places, of, strict=True) if name in outputs]
        if seen:
            axis.plot(
                *zip(*seen, strict=True), "o-", color=colour, ms=5, lw=1.6, label=f"{component}, outputs", zorder=3
            )
    axis.set_xticks(range(len(names)), [_short(name) for name in names], fontsize=8)
    _finish(axis, "Error of every block, relative to the reference", "block", "%")
    axis.set_ylim(0, None)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False, labelcolor=INK)
    return figure


def _short(name: str) -> str:
    last = name.rpartition(".")[2]
    return last if last.isdigit() else {"embed_tokens": "emb", "lm_head": "head"}.get(last, "proj")


def _finish(axis: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axis.set_xlabel(xlabel, color=INK)
    axis.set_ylabel(ylabel, color=INK)
    axis.grid(axis="y", color=GRID, zorder=0)
    axis.tick_params(length=0, colors=INK)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(PALE)


def as_svg(figure: Figure) -> str:
    """The drawing as an <svg> element, the same for the same figure."""
    written = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "vlmq", "svg.fonttype": "path"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    return text[text.index("<svg") :]
