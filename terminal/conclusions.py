"""How a command ends: what it found as JSON or a table, a line for what was missed, and the exit code."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vlmq.exporter.evaluation.verify import Verdict
    from vlmq.exporter.release import Release


def verdict_json(verdict: "Verdict") -> dict[str, object]:
    from vlmq.exporter.evaluation.report import as_dict

    return as_dict(verdict)


def print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=1))


def conclude(verdict: "Verdict", as_json: bool) -> None:
    """The table and the word, and exit 1 where a threshold was missed."""
    if not as_json:
        from vlmq.terminal.verdict import print_verdict

        print_verdict(verdict)
    for miss in verdict.misses:
        typer.echo(f"vlmq: {miss}", err=True)
    if not verdict.ok:
        raise typer.Exit(1)


def conclude_release(folder: Path, release: "Release | None") -> None:
    """What transformers made of an export: nothing where it is as it must be; else one line and exit 1."""
    if release is None:
        return
    if release.why_not:
        typer.echo(f"note: not loaded to check it: {release.why_not}", err=True)
    if not release.ok:
        typer.echo(f"vlmq: {folder}: failed the release gate: {'; '.join(release.misses)}; it stays there", err=True)
        raise typer.Exit(1)
