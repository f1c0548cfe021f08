"""The verdict on a terminal: what was missed, then the rows that decide, or all of them."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from vlmq.exporter.evaluation.report import PAGE, brief, criterion, misses, rows

if TYPE_CHECKING:
    from vlmq.exporter.evaluation.verify import Verdict

WIDE = 110  # columns, where nobody watches and nothing must be cut
MARKED = {True: "red", False: None}


def print_misses(verdict: "Verdict") -> None:
    for line in misses(verdict):
        typer.echo(f"vlmq: {line}", err=True)


def print_verdict(folder: Path, verdict: "Verdict", verbose: bool) -> None:
    asked = "questions" if verdict.accuracy else "prompts"
    table = Table(
        title=f"{folder} against {verdict.reference.folder}: {verdict.samples} {asked} about {verdict.images} images",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("")
    for heading in ("reference", "export", "difference"):
        table.add_column(heading, justify="right")
    missed = {miss.partition(":")[0] for miss in verdict.misses}
    for row in rows(verdict) if verbose else brief(verdict):
        style = MARKED[row.threshold in missed]
        table.add_row(row.label, row.reference, row.export, row.difference, style=style)
    console = Console()
    Console(width=None if console.is_terminal else WIDE).print(table)
    word = "[green]ok[/]" if verdict.ok else f"[red]failed[/], {len(verdict.misses)} missed"
    sides = [side for side in (verdict.reference, verdict.export) if side]
    engines = " / ".join(side.engine for side in sides)
    for line in (
        f"{word}: {criterion(verdict)}",
        f"differences: points, 95 % interval over images; memory and times: {engines}",
        f"more: {folder / PAGE}" + ("" if verbose else ", or --verbose"),
    ):
        console.print(line, highlight=False, soft_wrap=True)
