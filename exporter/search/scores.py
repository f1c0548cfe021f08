"""A table of scores: which bits each component had, and what the model then scored.

The layout is mmq's (paper 002): a CSV file with a header, one measured assignment of bits a row. Columns that end in
`_bits` are components; any other may be the target; the rest is not looked at.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmq.exporter.errors import VlmqError

SUFFIX = "_bits"
LEAST_ROWS = 10  # below, hardly a tree of a forest leaves a row out, and none is left to be judged on


@dataclass(frozen=True)
class Scores:
    """What a table says of one target.

    components: names without `_bits`, in the file's order.
    bits (rows, components), float32 as trees compare them; values (rows,), float64, the target's.
    """

    file: Path
    target: str
    components: tuple[str, ...]
    bits: np.ndarray
    values: np.ndarray


def read_scores(file: Path, target: str) -> Scores:
    """The bits and the target of a CSV file; VlmqError naming the line where it holds anything but numbers there."""
    header, lines = _lines(file)
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise VlmqError(f"{file}: {twice[0]} names two columns; keep one")
    columns = [name for name in header if name.endswith(SUFFIX) and name != SUFFIX]
    if len(columns) < 2:
        raise VlmqError(
            f"{file}: fewer than two columns end in {SUFFIX} (found: {', '.join(header) or 'nothing'}); "
            "give each component one, such as vit_bits"
        )
    others = [name for name in header if name and name not in columns]
    if target not in others:
        raise VlmqError(f"{file}: no scores named {target}; choose a --target of {', '.join(others) or 'your own'}")
    places = [header.index(name) for name in (*columns, target)]
    table = np.array([[_number(file, line, header, row, place) for place in places] for line, row in lines])
    if len(table) < LEAST_ROWS:
        raise VlmqError(f"{file}: fewer than {LEAST_ROWS} rows ({len(table)}); score more assignments of bits")
    bits, values = table[:, :-1].astype(np.float32), table[:, -1]
    if not (bits > 0).all():
        raise VlmqError(f"{file}: bits of 0 or less; write 16 where a component was left alone")
    if np.ptp(values) == 0:
        raise VlmqError(f"{file}: {target} is {values[0]:g} in every row, so no bits matter; choose another --target")
    if not np.ptp(bits, axis=0).any():
        raise VlmqError(f"{file}: every row has the same bits; score other assignments too")
    return Scores(file, target, tuple(name.removesuffix(SUFFIX) for name in columns), bits, values)


def _lines(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header's names, and each row under it with the number of its line."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise VlmqError(f"{file}: cannot be read ({error.strerror}); name a CSV file of scores") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise VlmqError(f"{file}: not CSV ({error}); name a CSV file of scores") from error
    if not lines:
        raise VlmqError(f"{file}: empty; name a CSV file of scores")
    return [name.strip() for name in lines[0][1]], lines[1:]


def _number(file: Path, line: int, header: list[str], row: list[str], place: int) -> float:
    if len(row) != len(header):
        raise VlmqError(f"{file}: line {line}: {len(row)} cells under {len(header)} names; complete or remove it")
    try:
        value = float(row[place])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise VlmqError(f"{file}: line {line}: {header[place]} is {row[place]!r}, not a number; correct or remove it")
    return value
