"""Ctrl-C and SIGTERM end a run like any exception, so that what is half written is removed; then, how to go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from vlmq.terminal.bars import HELPS

_signals: list[int] = []  # that came


def listen() -> None:
    """From now on, both signals raise SystemExit with the exit code 128 + signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def exit_code() -> int | None:
    """Of a run that was stopped: a library may have taken the exception for a failure of its own. None: it was not."""
    return 128 + _signals[0] if _signals else None


@contextmanager
def kept_to_go_on(output: Path) -> Iterator[None]:
    """Say how to go on with an export where a person, or the system, stopped it."""
    from vlmq.exporter.journal import folder_of

    try:
        yield
    except BaseException:
        if exit_code() and folder_of(output).is_dir():
            say("what is finished is kept; the same command goes on from there")
        elif exit_code() and output.is_dir():
            say(f"{output} is whole; vlmq verify {output} goes on from there")
        raise


@contextmanager
def answers_kept(file: Path) -> Iterator[None]:
    """Say how to go on with an evaluation whose answers are in `file`."""
    try:
        yield
    except BaseException:
        if exit_code() and file.is_file():
            say(f"{file} keeps what is answered; the same command goes on")
        raise


def say(line: str) -> None:
    if not HELPS:
        typer.echo(f"vlmq: {line}", err=True)


def _stop(number: int, frame: object) -> None:
    say("stopped")
    _signals.append(number)
    raise SystemExit(128 + number)
