"""Scores of a model, and their difference from another's, as tables."""

from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from vlmq.exporter.evaluation import tables
from vlmq.terminal.conclusions import print_json

if TYPE_CHECKING:
    from vlmq.exporter.evaluation.comparison import Comparison
    from vlmq.exporter.evaluation.summary import Summary


def print_evaluation(summary: "Summary", comparison: "Comparison | None", as_json: bool) -> None:
    if as_json:
        print_json(tables.as_dict(summary, comparison))
        return
    console = Console()
    wide = Console(width=None if console.is_terminal else 140)
    table = Table("", title=f"{summary.model} ({summary.engine}) on {summary.task}", title_justify="left")
    for heading in ("samples", "value"):
        table.add_column(heading, justify="right")
    for row in tables.summary_rows(summary):
        table.add_row(*row)
    wide.print(table)
    for note in tables.summary_notes(summary):
        typer.echo(f"note: {note}")
    if not comparison:
        return
    table = Table(
        "",
        title=f"against {comparison.reference}, {comparison.samples} samples that both answered",
        caption="differences: 95 % interval, bootstrap over images; McNemar: right only there : only here",
        title_justify="left",
    )
    for heading in ("reference", "this model", "difference", "McNemar", ""):
        table.add_column(heading, justify="right")
    for row in tables.comparison_rows(comparison):
        table.add_row(*row)
    wide.print(table)
    typer.echo(tables.verdict(comparison))
