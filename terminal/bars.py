"""What a person sees of a run under way: bars and notes."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from vlmq.exporter.progress import Progress, silent

HELPS = os.environ.get("RANK", "0") != "0"  # under torchrun: the first worker says what there is to say


@contextmanager
def bars(as_json: bool) -> Iterator[Progress]:
    """A progress callback: a bar with its ETA for each thing under way, and the memory in use; nothing where nobody
    watches; an event in a line of JSON on stderr for programs."""
    import psutil

    if HELPS:
        yield silent
        return
    memory = psutil.Process().memory_info
    if as_json:

        def event(what: str, done: int, of: int, at: str = "", /) -> None:
            said = {"event": "progress", "what": what, "done": done, "of": of, "at": at, "resident": memory().rss}
            typer.echo(json.dumps(said), err=True)

        yield event
        return
    if not sys.stderr.isatty():
        yield silent
        return
    from rich import progress as parts
    from rich.console import Console
    from rich.table import Column

    columns = (
        parts.TextColumn("{task.description}"),
        parts.BarColumn(bar_width=20),
        parts.MofNCompleteColumn(),
        parts.TimeElapsedColumn(),
        parts.TimeRemainingColumn(),
        parts.TextColumn("{task.fields[memory]}"),
        parts.TextColumn("{task.fields[at]}", style="dim", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with parts.Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, of: int, at: str = "", /) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of, completed=done, memory="", at="")
            bars.update(tasks[what], completed=done, memory=f"{memory().rss / 2**30:.2f} GiB", at=at)

        yield progress


def note(line: str) -> None:
    if not HELPS:
        typer.echo(f"note: {line}", err=True)
