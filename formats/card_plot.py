"""The plot of the model card: accuracy, size, memory and time after, in percent of before, from `report.json` alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "comparison.png"
COLOUR = "#4269d0"


def draw(report: Mapping[str, Any], folder: Path) -> str | None:
    """Draw NAME into the folder and return its name; None where the report measured nothing that can be compared."""
    found = shares(report)
    if not found:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 + 0.45 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bars = axes.barh(list(found), list(found.values()), color=COLOUR)
    axes.bar_label(bars, [f"{value:.1f} %" for value in found.values()], padding=3)
    axes.axvline(100, color="black", linewidth=1, linestyle=":")
    axes.set_xlim(0, 1.15 * max(100, *found.values()))
    axes.set_xlabel("after, in % of before")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / NAME, dpi=120, metadata={"Software": None})
    return NAME


def shares(report: Mapping[str, Any]) -> dict[str, float]:
    """What -> after in percent of before."""
    before, after = report.get("reference") or {}, report.get("export") or {}
    pairs: dict[str, tuple[float, float]] = {}
    overall = report.get("accuracy", {}).get("overall")
    if overall:
        pairs["accuracy"] = overall["reference"], overall["export"]
    if before and after:
        source = before["disk"].get("safetensors", 0)
        for kind, size in after["disk"].items():
            pairs[f"weights on disk, {kind}"] = source, size
        first, second = (side["memory"]["loaded"] - side["memory"]["imported"] for side in (before, after))
        pairs["memory of the model"] = first, second
        if before.get("seconds_per_answer") and after.get("seconds_per_answer"):
            pairs["time per answer"] = before["seconds_per_answer"], after["seconds_per_answer"]
    return {what: 100 * second / first for what, (first, second) in pairs.items() if first > 0 and second > 0}
