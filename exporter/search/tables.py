"""What a sweep leaves: a table for each series, in the layout of mmq, all rows as JSON, and plots."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmq.exporter.families import Component
from vlmq.exporter.search.pieces import Planned
from vlmq.exporter.search.scores import SUFFIX
from vlmq.formats.folder import full_disk_in_words, sync

ROWS = "rows.json"
NAMES: dict[Component, str] = {"vision": "vit", "connector": "connector", "language": "llm"}  # as paper 002 has them
CONNECTORS = {"blip-2": "qformer"}


@dataclass(frozen=True)
class Row:
    """A configuration that was scored. bits: of each component; bytes: of all weights; recipe None: the reference."""

    name: str
    series: str
    bits: dict[Component, float]
    bytes: int
    scores: dict[str, float]
    recipe: dict[str, Any] | None


def row(planned: Planned, scores: dict[str, float]) -> Row:
    said = planned.configuration
    return Row(said.name, said.series, planned.bits, planned.bytes, scores, said.recipe)


def write(rows: Sequence[Row], folder: Path, family: str) -> tuple[str, ...]:
    """The names of the files that were written: `scores.csv`, or one for each series; rows.json; plots."""
    from vlmq.exporter.search.sweep_plots import draw

    series = list(dict.fromkeys(row.series for row in rows))
    written = []
    for one in series:
        name = "scores.csv" if len(series) == 1 else f"scores-{re.sub(r'[^A-Za-z0-9.+_-]+', '-', one)}.csv"
        _write(folder / name, table([row for row in rows if row.series == one], family))
        written.append(name)
    _write(folder / ROWS, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return (*written, ROWS, *draw(rows, folder))


def table(rows: Sequence[Row], family: str) -> str:
    """vit_bits,qformer_bits,llm_bits,<scores...>,model_size: CSV, sizes in bits, as paper 002's scores have them."""
    components, scores = list(rows[0].bits), list(rows[0].scores)
    names = NAMES | ({"connector": CONNECTORS[family]} if family in CONNECTORS else {})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*(names[component] + SUFFIX for component in components), *scores, "model_size"])
    for row in rows:
        bits = [f"{row.bits[component]:.6g}" for component in components]
        writer.writerow([*bits, *(row.scores[score] for score in scores), 8 * row.bytes])
    return stream.getvalue()


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    with full_disk_in_words(file.parent):
        part.write_text(text, encoding="utf-8")
        sync(part)
        part.rename(file)
