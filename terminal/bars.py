"""What a person sees of a run under way: bars and notes."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

HELPS = os.environ.get("RANK", "0") != "0"  # under torchrun: the first worker says what there is to say


@contextmanager
def bars(as_json: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback: a bar with its ETA for each thing under way, and the memory in use; nothing where nobody
    watches; an event in a line of JSON on stderr for programs."""
    import psutil

    if HELPS:
        yield lambda what, done, of: None
        return
    memory = psutil.Process().memory_info
    if as_json:
        yield lambda what, done, of: typer.echo(
            json.dumps({"event": "progress", "what": what, "done": done, "of": of, "resident": memory().rss}), err=True
        )
        return
    if not sys.stderr.isatty():
        yield lambda what, done, of: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of, completed=done, memory="")
            bars.update(tasks[what], completed=done, memory=f"{memory().rss / 2**30:.2f} GiB")

        yield progress


def note(line: str) -> None:
    if not HELPS:
        typer.echo(f"note: {line}", err=True)
