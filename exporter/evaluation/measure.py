"""One model measured in a process of its own: its answers, its memory, its speed, and what its components put out.

A fresh process is the only way to know what a model takes: in one that held another model before, freed memory
is still resident. It also bounds the whole evaluation by one model at a time. `worker.py` is the other end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.answers import BATCH, MAX_NEW_TOKENS
from vlmq.exporter.runtime import Engine
from vlmq.exporter.samples import Sample

TIMED = 24  # samples answered one at a time
PROBES = 32  # samples whose component outputs are kept


@dataclass(frozen=True)
class Request:
    """What a worker is to do; it travels as JSON."""

    folder: str
    engine: Engine
    samples: list[Sample]  # to answer
    timed: list[Sample]  # to answer one at a time first, under the clock
    probes: list[Sample]  # to keep component outputs of
    batch_size: int = BATCH
    max_new_tokens: int = MAX_NEW_TOKENS

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), default=str))

    @staticmethod
    def read(path: Path) -> Request:
        fields = json.loads(path.read_text())
        for name in ("samples", "timed", "probes"):
            fields[name] = [_sample(sample) for sample in fields[name]]
        return Request(**fields)


def _sample(fields: dict[str, Any]) -> Sample:
    image = fields["image"]
    return Sample(**{**fields, "image": image and Path(image), "answers": tuple(fields["answers"])})


@dataclass(frozen=True)
class Memory:
    """Resident bytes of the process: with everything imported, then with the model, and the peak while it answers.

    The peak is that of answering one sample at a time, as the model is used, not of the batches of an evaluation.
    """

    imported: int
    loaded: int
    peak: int

    @property
    def model(self) -> int:
        """What loading the model added."""
        return self.loaded - self.imported


@dataclass(frozen=True)
class Measurement:
    """What a worker found."""

    engine: Engine
    texts: list[str]
    tokens: list[list[int]]
    memory: Memory
    seconds_per_answer: float | None  # the median of the timed samples; None without any
    threads: int
    outputs: dict[str, np.ndarray] = field(default_factory=dict)  # by component, of the probes


def measure(
    folder: Path,
    engine: Engine,
    samples: Sequence[Sample],
    timed: int = TIMED,
    probes: int = PROBES,
    batch_size: int = BATCH,
    max_new_tokens: int = MAX_NEW_TOKENS,
    answer: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Answer all of the samples (none but the probes without `answer`) with the model in `folder`.

    VlmqError with the worker's own line where it refuses, or with its last line where it dies.
    """
    request = Request(
        folder=str(folder),
        engine=engine,
        samples=list(samples) if answer else [],
        timed=list(samples[:timed]) if answer else [],
        probes=_distinct(samples)[:probes],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    with tempfile.TemporaryDirectory(prefix="vlmq-measure-") as work:
        return _run(request, Path(work), progress)


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    """The first sample of every image."""
    first: dict[Path | None, Sample] = {}
    for sample in samples:
        first.setdefault(sample.image, sample)
    return list(first.values())


def _run(request: Request, work: Path, progress: Callable[[int, int], None] | None) -> Measurement:
    request.write(work / "request.json")
    # Like the `vlmq` script, and unlike a plain `python -m`, the worker imports nothing from the working directory.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "vlmq.exporter.evaluation.worker", str(work)]
    errors = work / "stderr"
    with (
        errors.open("w") as written,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=written, text=True, env=environment) as process,
    ):
        try:
            for line in process.stdout or ():
                done, of = map(int, line.split())
                if progress:
                    progress(done, of)
        except BaseException:  # interrupted: leave nothing running
            process.kill()
            raise
    if process.returncode:
        raise VlmqError(_fault(request, work, process.returncode, errors.read_text(errors="replace")))
    return _read(work)


def _fault(request: Request, work: Path, code: int, errors: str) -> str:
    refusal = work / "refusal"
    if refusal.exists():
        return refusal.read_text()
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
    how = f"was ended by signal {-code}, often for lack of memory" if code < 0 else "failed"
    return f"{request.folder}: the process that runs it in {request.engine} {how}: {last.strip()}"


def _read(work: Path) -> Measurement:
    found = json.loads((work / "found.json").read_text())
    outputs: dict[str, np.ndarray] = {}
    if (work / "outputs.npz").exists():
        with np.load(work / "outputs.npz") as kept:
            outputs = dict(kept)
    return Measurement(**{**found, "memory": Memory(**found["memory"])}, outputs=outputs)
