"""docs/methods.png: accuracy against bits per weight where weights alone are rounded; divergence where inputs are too.

Error bars are the intervals of cells.py.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cells import Cell, Cells
from configurations import CHECKPOINTS, FULL, VARIANTS, WEIGHT_ONLY, WITH_INPUTS, Configuration
from matplotlib.axes import Axes

WIDTHS = (2, 3, 4, 8)
BUDGETS = (
    ("W8A8\ntensor", 8, "tensor"),
    ("W4A4\ntensor", 4, "tensor"),
    ("W4A4\ntoken", 4, "token"),
    ("W4A4\ng64", 4, "g64"),
)
METHODS = tuple(dict.fromkeys([*WEIGHT_ONLY, *WITH_INPUTS]))
PALETTE = plt.get_cmap("tab20").colors
COLOURS = dict(zip(METHODS, [*PALETTE[::2], *PALETTE[1::2]], strict=False))
MARKERS = dict(zip(METHODS, "osD^vP" * len(METHODS), strict=False))


def draw(cells: Cells, picture: Path) -> None:
    columns = [(checkpoint, variant) for checkpoint in CHECKPOINTS for variant in VARIANTS]
    figure, axes = plt.subplots(2, len(columns), figsize=(16, 8.5), sharey="row", layout="constrained")
    for place, (checkpoint, variant) in enumerate(columns):
        upper, lower = axes[0, place], axes[1, place]
        upper.set_title(f"{checkpoint}, {variant}")
        _weights(upper, cells, checkpoint, variant)
        _inputs(lower, cells, checkpoint, variant)
        _reference(upper, cells.reference(checkpoint, variant))
        upper.set_ylim(0, 103)
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy, %")
    axes[1, 0].set_ylabel("KL of the first token, nats")
    for row in axes:
        handles = {
            label: handle for axis in row for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        if handles:
            row[-1].legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.suptitle("All components quantized: weights alone (above), weights and inputs (below)")
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def _weights(axis: Axes, cells: Cells, checkpoint: str, variant: str) -> None:
    for method in WEIGHT_ONLY:
        granularity = "tensor" if method == "uniform" else "g64"
        found = [
            cell
            for bits in WIDTHS
            if (cell := cells.get(checkpoint, variant, Configuration(method, bits, FULL, granularity, "all")))
        ]
        _points(axis, [cell.mean("bits_per_weight") for cell in found], found, method)
    axis.set_xlabel("bits per weight, scales counted")
    axis.set_xscale("log", base=2)
    axis.set_xticks(WIDTHS, map(str, WIDTHS))


def _inputs(axis: Axes, cells: Cells, checkpoint: str, variant: str) -> None:
    """A group of points for each budget, a method always at the same place in it."""
    for number, method in enumerate(WITH_INPUTS):
        found = {
            place: cell
            for place, (_, bits, granularity) in enumerate(BUDGETS)
            if (cell := cells.get(checkpoint, variant, Configuration(method, bits, bits, granularity, "all")))
        }
        shift = 0.8 * (number / (len(WITH_INPUTS) - 1) - 0.5)
        if found:
            places, divergences = (
                [place + shift for place in found],
                [cell.mean("divergence") for cell in found.values()],
            )
            axis.plot(places, divergences, MARKERS[method], label=method, color=COLOURS[method], markersize=5)
    axis.set_yscale("log")
    axis.set_xticks(range(len(BUDGETS)), [label for label, *_ in BUDGETS])
    axis.set_xlim(-0.5, len(BUDGETS) - 0.5)
    for edge in range(1, len(BUDGETS)):
        axis.axvline(edge - 0.5, color="0.85", linewidth=1)


def _points(axis: Axes, places: list[float], found: list[Cell], method: str) -> None:
    if not found:
        return
    means = [cell.accuracy.points for cell in found]
    bars = [
        [mean - cell.accuracy.low for mean, cell in zip(means, found, strict=True)],
        [cell.accuracy.high - mean for mean, cell in zip(means, found, strict=True)],
    ]
    axis.errorbar(
        places,
        means,
        bars,
        label=method,
        color=COLOURS[method],
        linestyle="-",
        marker=MARKERS[method],
        markersize=5,
        capsize=2,
    )


def _reference(axis: Axes, reference: Cell | None) -> None:
    if reference:
        axis.axhline(reference.accuracy.points, color="0.4", linestyle="--", linewidth=1, label="reference")
