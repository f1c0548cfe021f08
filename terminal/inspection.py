"""A model's linears as a tree."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.tree import Tree

if TYPE_CHECKING:
    from vlmq.exporter.inspection import Inspection


def print_tree(found: "Inspection") -> None:
    def megabytes(before: int, after: int) -> str:
        return f"{before / 1e6:,.2f} MB -> {after / 1e6:,.2f} MB"

    tree = Tree(
        f"[bold]{found.model}[/] ({found.family}): {found.parameters / 1e6:,.1f} M parameters, "
        f"{megabytes(found.before, found.after)}{', rotated: ' + ', '.join(found.rotated) if found.rotated else ''}"
    )
    for component, blocks in found.components.items():
        total = megabytes(sum(entry.before for entry in blocks), sum(entry.after for entry in blocks))
        parameters = sum(entry.parameters for entry in blocks)
        branch = tree.add(f"[bold]{component}[/]: {parameters / 1e6:,.2f} M in linears, {total}")
        for entry in blocks:
            times = f" and {entry.count - 1} more alike" if entry.count > 1 else ""
            leaf = branch.add(f"{entry.name}{times}: {megabytes(entry.before, entry.after)}")
            for linear in entry.linears:
                leaf.add(f"{linear.name} {linear.shape[0]} x {linear.shape[1]}: {linear.plan}", highlight=False)
    kept = tree.add(f"[bold]kept[/]: {found.elsewhere / 1e6:,.2f} MB outside the blocks' linears")
    reasons: dict[str, list[str]] = {}
    for name, reason in found.kept.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        kept.add(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}")
    console = Console()
    Console(width=None if console.is_terminal else 140).print(tree)
