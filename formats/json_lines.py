"""A file with a JSON value on each line, appended as they are found: what a run that was killed goes on from.

A line is one write, and on the disk when `append` returns. One that was cut short, at the file's end, is no value; the
next begins behind it.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append(file: Path, value: Any) -> None:
    """Make a value the last of the file, which need not exist; OSError where it cannot be written."""
    with file.open("a+b", buffering=0) as stream:
        end = stream.seek(0, os.SEEK_END)
        torn = False
        if end:
            stream.seek(end - 1)
            torn = stream.read(1) != b"\n"
        stream.write((b"\n" if torn else b"") + json.dumps(value).encode() + b"\n")
        os.fsync(stream.fileno())


def read(file: Path) -> Iterator[Any]:
    """Every value of the file, in order; none where there is no file."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
