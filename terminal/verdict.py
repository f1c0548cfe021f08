"""The verdict as a table."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from vlmq.exporter.evaluation.report import criterion, rows

if TYPE_CHECKING:
    from vlmq.exporter.evaluation.verify import Verdict


def print_verdict(verdict: "Verdict") -> None:
    title = (
        f"{verdict.samples} questions about {verdict.images} images"
        if verdict.accuracy
        else f"{verdict.samples} prompts"
    )
    table = Table(title=title, caption="differences: points, with a 95 % interval over images", title_justify="left")
    table.add_column("")
    for heading in ("reference", "export", "difference"):
        table.add_column(heading, justify="right")
    for row in rows(verdict):
        table.add_row(row.label, row.reference, row.export, row.difference)
    console = Console()
    Console(width=None if console.is_terminal else 110).print(table)
    word = "[green]ok[/]" if verdict.ok else "[red]failed[/]"
    console.print(f"{word}: {criterion(verdict)}")
