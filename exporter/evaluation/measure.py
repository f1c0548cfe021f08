"""One model measured in a process of its own: its answers, its memory, its speed, and what its components put out.

A fresh process is the only way to know what a model takes: in one that held another model before, freed memory
is still resident. It also bounds the whole evaluation by one model at a time. `worker.py` is the other end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.answers import BATCH, MAX_NEW_TOKENS
from vlmq.exporter.evaluation.sensitivity import Shown
from vlmq.exporter.evaluation.speed import Speed
from vlmq.exporter.runtime import Engine
from vlmq.exporter.samples import Sample

FOUND, OUTPUTS = "found.json", "outputs.npz"
TIMED = 24  # samples answered one at a time
PROBES = 64  # samples about different images, looked at closely: outputs, logits, and what other images change
COMPARED = 32  # of those, whose component outputs are kept


@dataclass(frozen=True)
class Request:
    """What a worker is to do; it travels as JSON."""

    folder: str
    engine: Engine
    samples: list[Sample]  # to answer
    timed: list[Sample]  # to answer one at a time, under the clock
    probes: list[Sample]  # to look at closely
    forced: list[list[int]] | None = None  # tokens of the probes' answers to follow; None: its own
    timed_last: bool = False  # so that what is measured next, timed first, runs under the same conditions
    batch_size: int = BATCH
    max_new_tokens: int = MAX_NEW_TOKENS

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), default=str))

    @staticmethod
    def read(path: Path) -> Request:
        said = json.loads(path.read_text())
        for name in ("samples", "timed", "probes"):
            said[name] = [_sample(sample) for sample in said[name]]
        return Request(**said)


def _sample(said: dict[str, Any]) -> Sample:
    image = said["image"]
    return Sample(**{**said, "image": image and Path(image), "answers": tuple(said["answers"])})


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
    """What a worker found. `outputs` are read from its files each time they are asked for; of the probes:

    vision, connector, language    as in components.py
    block:NAME                     the same of blocks
    logits                         (positions, vocabulary), along the answers that `lengths` are of
    """

    engine: Engine
    texts: list[str]
    tokens: list[list[int]]
    memory: Memory
    speed: Speed | None  # None where no sample was timed
    threads: int
    shown: Shown  # of the probes
    lengths: list[int]  # positions of each probe's answer: its tokens, and its end
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def seconds_per_answer(self) -> float | None:
        return self.speed.seconds_per_answer if self.speed and self.speed.answer else None

    @staticmethod
    def read(folder: Path) -> Measurement:
        found = json.loads((folder / FOUND).read_text())
        found["memory"], found["shown"] = Memory(**found["memory"]), Shown(**found["shown"])
        found["speed"] = found["speed"] and Speed(**found["speed"])
        with_outputs = (folder / OUTPUTS).exists()
        return Measurement(**found, outputs=np.load(folder / OUTPUTS) if with_outputs else {})

    def write(self, folder: Path) -> None:
        if self.outputs:
            np.savez(folder / OUTPUTS, **dict(self.outputs))  # type: ignore[arg-type]  # any names but its own flag's
        found = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "outputs"}
        (folder / FOUND).write_text(json.dumps(found, default=asdict))


def measure(
    folder: Path,
    engine: Engine,
    samples: Sequence[Sample],
    keep: Path,
    *,
    timed: int = TIMED,
    probes: int = PROBES,
    batch_size: int = BATCH,
    max_new_tokens: int = MAX_NEW_TOKENS,
    answer: bool = True,
    forced: list[list[int]] | None = None,
    timed_last: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Answer all of the samples (none but the probes without `answer`) with the model in `folder`.

    keep: an empty folder for what is found, which must last as long as the outputs are read. VlmqError with the
    worker's own line where it refuses, or with its last line where it dies.
    """
    request = Request(
        folder=str(folder),
        engine=engine,
        samples=list(samples) if answer else [],
        timed=list(samples[:timed]),
        probes=_distinct(samples)[:probes],
        forced=forced,
        timed_last=timed_last,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    return run(request, keep, progress)


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    """The first sample of every image."""
    first: dict[Path | None, Sample] = {}
    for sample in samples:
        first.setdefault(sample.image, sample)
    return list(first.values())


def run(request: Request, work: Path, progress: Callable[[int, int], None] | None = None) -> Measurement:
    """Have a worker do what is requested."""
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
            process.wait()  # Popen itself waits a quarter of a second for it after Ctrl-C, which a busy machine exceeds
            raise
    if process.returncode:
        raise VlmqError(_fault(request, work, process.returncode, errors.read_text(errors="replace")))
    return Measurement.read(work)


def _fault(request: Request, work: Path, code: int, errors: str) -> str:
    refusal = work / "refusal"
    if refusal.exists():
        return refusal.read_text()
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
    how = f"was ended by signal {-code}, often for lack of memory" if code < 0 else "failed"
    return f"{request.folder}: the process that runs it in {request.engine} {how}: {last.strip()}"
