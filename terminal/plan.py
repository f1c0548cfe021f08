"""What an export will take and make, as tables."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vlmq.exporter.planning.plan import Plan


def print_plan(found: "Plan") -> None:
    def megabytes(count: int) -> str:
        return f"{count / 1e6:,.1f}"

    made = Table("", "linears", "bits", title=f"{found.model} ({found.family})")
    for heading in ("before, MB", "after, MB"):
        made.add_column(heading, justify="right")
    for name, part in found.components.items():
        bits = ", ".join(map(str, part.bits))
        made.add_row(name, str(part.linears), bits, megabytes(part.before), megabytes(part.after))
    made.add_row("all else", "", "", *[megabytes(found.elsewhere)] * 2, end_section=True)
    made.add_row(f"{found.parameters / 1e6:,.1f} M parameters", "", "", *map(megabytes, (found.before, found.after)))
    tables = [made]
    for what, needs, there in (("memory", found.memory, found.available_memory), ("disk", found.disk, found.free_disk)):
        table = Table(what, title=f"{what}, step by step; {megabytes(there)} MB are free")
        table.add_column("MB", justify="right")
        table.add_column("why")
        for need in needs:
            table.add_row(f"[bold]{need.step}", f"[bold]{megabytes(need.bytes)}")
            for part in (part for part in need.parts if part.bytes):
                table.add_row(f"  {part.name}", megabytes(part.bytes), part.reason)
            table.add_section()
        tables.append(table)
    console = Console()
    Console(width=None if console.is_terminal else 140).print(*tables)
