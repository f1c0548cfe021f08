"""The importance of components as a table."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vlmq.exporter.search.importance import Importance


def print_shares(found: "Importance") -> None:
    shares = found.shares["consensus"]
    table = Table(
        title=f"{found.name}: {found.target}, {found.rows} rows, out-of-bag R^2 {found.explained:.4f}",
        caption="percent; interval: bootstrap over rows; seeds: forests of other seeds",
        title_justify="left",
    )
    table.add_column("")
    for heading in (*found.shares, "95 % interval", "over seeds"):
        table.add_column(heading, justify="right")
    for component, share in shares.items():
        measured = [f"{measure[component].percent:.1f}" for measure in found.shares.values()]
        interval, seeds = f"{share.low:.1f} to {share.high:.1f}", f"{share.least:.1f} to {share.most:.1f}"
        table.add_row(component, *measured, interval, seeds)
    console = Console()
    Console(width=None if console.is_terminal else 110).print(table)
