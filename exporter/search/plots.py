"""Bar plots of shares, of the kinds of paper 002: consensus side by side (Figures 7, 8), every measure (Figure 12)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from vlmq.exporter.search.importance import Importance, Share

CONSENSUS = "consensus.png"
MEASURES = "measures.png"

PALETTE = ("#3b6fb6", "#e0a030", "#b0413e", "#5a9e6f", "#7d5ba6", "#6f7378")  # of components, one after the other
SHADES = {"impurity": "#a9c4df", "permutation": "#6f9bc8", "shap": "#3b6fb6", "consensus": "#c8632f"}
LABELS = {"impurity": "forest impurity", "permutation": "permutation", "shap": "mean |SHAP|", "consensus": "consensus"}
INK = "#22303f"
GROUP = 0.8  # of the way from one group of bars to the next
ROW = 4  # panels beside each other


def draw(found: Sequence[Importance], folder: Path) -> None:
    """Write both plots as PNG; the same shares give the same bytes."""
    for name, figure in ((CONSENSUS, consensus(found)), (MEASURES, measures(found))):
        figure.savefig(folder / name, dpi=160, metadata={"Software": None})


def consensus(found: Sequence[Importance]) -> Figure:
    """A group of bars for each table, a bar for each component, with its 95 % interval (Figures 7 and 8)."""
    tables = [importance.shares["consensus"] for importance in found]
    components = list(dict.fromkeys(component for shares in tables for component in shares))
    most = max(len(shares) for shares in tables)
    figure = Figure(figsize=(max(5.0, 1.5 + 0.65 * most * len(found)), 4.2), layout="constrained")
    axis = figure.add_subplot()
    width = GROUP / most
    for number, component in enumerate(components):
        at = {
            group + width * (list(shares).index(component) - (len(shares) - 1) / 2): shares[component]
            for group, shares in enumerate(tables)
            if component in shares
        }
        _bars(axis, at, width, PALETTE[number % len(PALETTE)], component)
    axis.set_xticks(range(len(found)), [importance.name for importance in found])
    axis.set_xlim(-GROUP, len(found) - 1 + GROUP)
    _finish(axis, f"What {found[0].target} hangs on: consensus of three measures", "share of importance, %")
    legend(figure, axis)
    return figure


def measures(found: Sequence[Importance]) -> Figure:
    """A panel for each table, a group for each component, a bar for each measure (Figure 12)."""
    across = min(ROW, len(found))
    down = math.ceil(len(found) / across)
    figure = Figure(figsize=(max(6.0, 4.6 * across), 0.6 + 3.6 * down), layout="constrained")
    axes = figure.subplots(down, across, sharey=True, squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place >= len(found):
            axis.set_axis_off()
            continue
        importance = found[place]
        width = GROUP / len(importance.shares)
        for number, (measure, shares) in enumerate(importance.shares.items()):
            shift = width * (number - (len(importance.shares) - 1) / 2)
            at = {group + shift: share for group, share in enumerate(shares.values())}
            _bars(axis, at, width, SHADES[measure], LABELS[measure])
        axis.set_xticks(range(len(importance.shares["consensus"])), list(importance.shares["consensus"]))
        _finish(
            axis, f"{importance.name}, {importance.target}", "share of importance, %" if place % across == 0 else ""
        )
    legend(figure, axes[0, 0])
    return figure


def _bars(axis: Axes, at: dict[float, Share], width: float, colour: str, label: str) -> None:
    """Bars at places along the axis, each with its interval and, above that, its number."""
    percents = [share.percent for share in at.values()]
    axis.bar(list(at), percents, 0.92 * width, color=colour, label=label, zorder=2)
    below = [max(0.0, share.percent - share.low) for share in at.values()]
    above = [max(0.0, share.high - share.percent) for share in at.values()]
    axis.errorbar(list(at), percents, (below, above), fmt="none", ecolor=INK, elinewidth=1, capsize=2.5, zorder=3)
    for place, share in at.items():
        top = max(share.percent, share.high)
        axis.annotate(
            f"{share.percent:.1f}",
            (place, top),
            (0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color=INK,
        )


def _finish(axis: Axes, title: str, ylabel: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axis.set_ylabel(ylabel, color=INK)
    axis.set_ylim(0, 108)
    axis.set_yticks(range(0, 101, 20))
    axis.grid(axis="y", color="#e3e7ec", zorder=0)
    axis.tick_params(length=0, colors=INK)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color("#9aa5b1")


def legend(figure: Figure, axis: Axes) -> None:
    """What an axis has labelled, below all of the figure's."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False, labelcolor=INK
    )
