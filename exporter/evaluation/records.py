"""Results on disk: a `.jsonl` whose first line says what was asked of what, and every other what became of a sample.

While a model answers, lines are appended batch by batch, so that a run that was ended goes on where its file ends. When
all is answered the file is written anew, with the scores and in the order of the samples, by a rename. It holds the
references too: tables and comparisons need nothing but such files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.json_files import parse, read_text

FORMAT = 1
REMEDY = "name a file that vlmq evaluate wrote, or another --out"


class Header(BaseModel):
    """What the answers depend on. A run goes on only in a file with an equal one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vlmq_results: int = FORMAT
    task: str
    data: str
    model: str
    weights: str  # SHA-256 over the files that were run
    engine: str
    samples: int
    samples_sha256: str  # of the ids, what is asked, and the references
    batch_size: int
    max_new_tokens: int
    rerank: int = 0
    versions: dict[str, str]


class Record(BaseModel):
    """One sample and what became of it: an answer, or why there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    image: str | None = None
    question: str | None = None
    references: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answer: str | None = None
    tokens: tuple[int, ...] = ()
    rank: int | None = None  # in retrieval: how many wrong ones come before the right one
    score: float | None = None  # known when all are answered
    failed: str | None = None

    def line(self) -> str:
        return self.model_dump_json(exclude_defaults=True) + "\n"


class Results(BaseModel):
    """A whole file."""

    header: Header
    records: list[Record]

    @property
    def answered(self) -> list[Record]:
        return [record for record in self.records if record.failed is None]


def read(path: Path) -> Results:
    """A finished file; VlmqError where it is none, or where the run that writes it has not ended."""
    header, records, whole = _read(path)
    if header is None:
        raise VlmqError(f"{path}: is empty; {REMEDY}")
    if whole < path.stat().st_size or len(records) < header.samples or not _are_scored(records):
        raise VlmqError(f"{path}: its run was ended after {len(records)} of {header.samples} samples; finish it first")
    return Results(header=header, records=records)


class Journal:
    """A results file that is being written. `done`: the records of whole batches that are there."""

    def __init__(self, path: Path, header: Header, batches: Sequence[Sequence[str]], fresh: bool = False) -> None:
        """batches: the ids of each, in the order of the run. VlmqError where the file is of another run."""
        self.path = path
        found, records, _ = (None, [], 0) if fresh or not path.exists() else _read(path)
        if found is not None and found != header:
            said, asked = found.model_dump(), header.model_dump()
            differing = ", ".join(key for key in said if said[key] != asked[key])
            raise VlmqError(f"{path}: has answers with another {differing}; name another --out, or pass --fresh")
        self.header = header
        by_id = {record.id: record for record in records}
        self.done: dict[str, Record] = {}
        for ids in batches:
            if all(id_ in by_id for id_ in ids):
                self.done.update((id_, by_id[id_]) for id_ in ids)
        self.finished = found is not None and len(records) == header.samples and _are_scored(records)
        self._is_clean = False

    def add(self, records: Sequence[Record]) -> None:
        """Append a whole batch, and see it on the disk."""
        if not self._is_clean:
            # What a torn batch left is answered again, so that the file ends as an unbroken run's.
            _replace(self.path, self.header, self.done.values())
            self._is_clean = True
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(record.line() for record in records)
                file.flush()
                os.fsync(file.fileno())
        except OSError as fault:
            line = f"{self.path}: cannot be written ({fault.strerror}); make room, and give the same command again"
            raise VlmqError(line) from None
        self.done.update((record.id, record) for record in records)


def _are_scored(records: Iterable[Record]) -> bool:
    return all(record.failed is not None or record.score is not None for record in records)


def finish(path: Path, header: Header, records: Sequence[Record]) -> None:
    """Write the whole file, with scores, in the samples' order."""
    _replace(path, header, records)


def _replace(path: Path, header: Header, records: Iterable[Record]) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(header.model_dump_json() + "\n")
            file.writelines(record.line() for record in records)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as fault:
        part.unlink(missing_ok=True)
        raise VlmqError(f"{path}: cannot be written ({fault.strerror}); choose another --out") from None


def _read(path: Path) -> tuple[Header | None, list[Record], int]:
    """Header, the records of whole lines, and the bytes that these take; a last line that was cut short is left out."""
    text = read_text(path)
    *lines, _torn = text.split("\n")  # not splitlines(): answers may hold other line ends
    if not lines:
        return None, [], 0
    _refuse_another_format(path, lines[0])
    header = parse(lines[0], Header, f"{path}:1", REMEDY)
    records = [parse(line, Record, f"{path}:{number}", REMEDY) for number, line in enumerate(lines[1:], start=2)]
    repeated = len(records) - len({record.id for record in records})
    if repeated:
        raise VlmqError(f"{path}: {repeated} ids occur more than once; {REMEDY}")
    return header, records, sum(len(line.encode()) + 1 for line in lines)


def _refuse_another_format(path: Path, line: str) -> None:
    try:
        content = json.loads(line)
    except ValueError:
        content = None
    said = content.get("vlmq_results") if isinstance(content, dict) else None
    if said != FORMAT:
        raise VlmqError(f"{path}: not results of vlmq evaluate (format {FORMAT}); {REMEDY}")
