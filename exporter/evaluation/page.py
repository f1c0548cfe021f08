"""`report.html`: a verdict on one page that needs nothing beside it, plots and pictures included."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

import vlmq
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import plots
from vlmq.exporter.evaluation.thresholds import Threshold, measured
from vlmq.exporter.evaluation.verify import Verdict
from vlmq.exporter.images import open_image

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SIDE = 224  # pixels of a picture's longer side


def render(verdict: Verdict, rows: Sequence[Any], thresholds: Mapping[str, Threshold]) -> str:
    """The page; rows: the lines of the table, with label, reference, export and difference."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    drawn = [plots.as_svg(figure) for figure in (plots.accuracy(verdict), plots.blocks(verdict)) if figure]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        verdict=verdict,
        rows=rows,
        demands=[*_demands(verdict, thresholds)],
        plots=drawn,
        examples=[{"picture": _inline(example.image), **vars(example)} for example in verdict.examples],
        release=vlmq.__version__,
    )


def _demands(verdict: Verdict, thresholds: Mapping[str, Threshold]) -> list[dict[str, Any]]:
    """Every threshold that is demanded, with what was measured; that of weights is told by its misses."""
    lines = []
    for name, where, value in measured(verdict):
        limit, threshold = verdict.thresholds[name], thresholds[name]
        if limit is None:
            continue
        ok = value <= limit if threshold.at_most else value >= limit
        lines.append(
            {
                "name": name,
                "meaning": f"{where}{threshold.meaning}",
                "demanded": f"{'at most' if threshold.at_most else 'at least'} {limit:g} {threshold.unit}".strip(),
                "value": f"{value:.4g}",
                "ok": ok,
            }
        )
    return lines


def _inline(path: str) -> str | None:
    """A picture as a data URL; None where it is there no more."""
    try:
        image = open_image(Path(path))
    except VlmqError:
        return None
    if max(image.size) < SIDE:  # a small one is shown larger, its pixels sharp
        factor = SIDE // max(image.size)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    written = io.BytesIO()
    image.save(written, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
