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


def conclude(
    folder: Path, verdict: "Verdict | None", release: "Release | None", as_json: bool, verbose: bool = False
) -> None:
    """What was missed, a line each; then the table and the word; and exit 1 where anything was missed.

    Nothing is said of what was not asked for, nor of a release that is as it must be.
    """
    missed = False
    if release is not None:
        if release.why_not:
            typer.echo(f"note: not loaded to check it: {release.why_not}", err=True)
        if not release.ok:
            lines = "; ".join(release.misses)
            typer.echo(f"vlmq: {folder}: failed the release gate: {lines}; it stays there", err=True)
            missed = True
    if verdict is not None:
        from vlmq.terminal.verdict import print_misses, print_verdict

        print_misses(verdict)
        if not as_json:
            print_verdict(folder, verdict, verbose)
        missed = missed or not verdict.ok
    if missed:
        raise typer.Exit(1)
