"""What a model answers: whole, or piece by piece as it is said."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from vlmq.terminal.conclusions import print_json

if TYPE_CHECKING:
    from vlmq.exporter.runtime import Answer, Piece


def print_answers(answers: "Sequence[Answer]", as_json: bool) -> None:
    """An answer a line; as JSON, a list of them where there is more than one."""
    if as_json:
        found = [asdict(answer) for answer in answers]
        print_json(found if len(found) > 1 else found[0])
    else:
        for answer in answers:
            typer.echo(answer.text)


def print_stream(pieces: "Iterable[Piece]", as_json: bool) -> None:
    """An answer a line, the first as it is said; as JSON, a piece a line."""
    from vlmq.exporter.inference.answers import in_order

    for text in (f"{json.dumps(asdict(piece))}\n" for piece in pieces) if as_json else in_order(pieces):
        typer.echo(text, nl=False)
        sys.stdout.flush()
