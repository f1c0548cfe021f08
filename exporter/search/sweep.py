"""A sweep: every configuration of a grid quantized and scored, with nothing done twice (paper 002, section 3).

grid -> configurations -> distinct ones -> pieces, quantized once -> compositions, scored once -> rows
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers

import vlmq
from vlmq.exporter import data as datas
from vlmq.exporter.checkpoint import Checkpoint, open_checkpoint
from vlmq.exporter.devices import device_of
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.tasks import task as evaluation
from vlmq.exporter.progress import Progress, silent
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.rotation import rotate
from vlmq.exporter.samples import COUNT, Sample, image_digests, refuse_leakage
from vlmq.exporter.search import engines, tables
from vlmq.exporter.search.bench import Bench
from vlmq.exporter.search.engines import Each, EngineName, Outcome
from vlmq.exporter.search.grid import configurations, read_grid
from vlmq.exporter.search.ledger import ATTEMPTS, Ledger, opened
from vlmq.exporter.search.pieces import Piece, Planned, plan
from vlmq.exporter.search.tables import Row
from vlmq.exporter.search.tasks import Asked, asked_of, official, task_of
from vlmq.exporter.walk import walk
from vlmq.formats import manifest
from vlmq.formats.folder import companions


@dataclass(frozen=True)
class Request:
    """All that a sweep depends on, and how it is run.

    questions: how many samples of the data are asked, from the first; None: all. sequential: quantize every distinct
    configuration as an export does, each component on what the quantized ones before it put out, and compose nothing.
    """

    model: str
    grid: Path
    output: Path
    task: str = "vqa"
    revision: str | None = None
    calibration: str | None = None
    samples: int = COUNT
    seed: int = 0
    data: str | None = None
    questions: int | None = None
    sequential: bool = False
    workers: int = 1
    engine: EngineName = "process"
    address: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Swept:
    """What a sweep found. rows: of every configuration that was scored. failures: name -> message.

    distinct, pieces: how many configurations were measured, and how many quantizations they are made of.
    """

    folder: Path
    rows: tuple[Row, ...]
    failures: dict[str, str]
    distinct: int
    pieces: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; it travels to other processes and machines, which see the same folders."""

    model: str
    revision: str | None
    rotate: tuple[str, ...]
    task: str
    calibration: tuple[Sample, ...]
    evaluation: tuple[evaluation.Asked, ...]
    pieces: Path
    device: str  # cpu, cuda, which is a worker's own of several, or cuda:1


@dataclass(frozen=True)
class Make:
    """Quantize a piece."""

    piece: Piece


@dataclass(frozen=True)
class Measure:
    """Score a composition; or, where there is a recipe, what an export of it would hold."""

    key: str
    pieces: tuple[Piece, ...]
    recipe: dict[str, Any] | None = None


def sweep(request: Request, progress: Progress = silent) -> Swept:
    """Measure what is not measured yet, and write tables and plots; VlmqError, before any work, for bad input."""
    task_of(request.task)
    grid = read_grid(request.grid)
    device = _device(request)
    engines.refuse(request.engine, request.workers, request.address)
    checkpoint = open_checkpoint(request.model, request.revision)
    found = configurations(grid, walk(checkpoint.skeleton(), checkpoint.family), request.grid)
    rotations = {make_recipe(each.recipe).rotate for each in found if each.recipe}
    if len(rotations) > 1:
        raise VlmqError(f"{request.grid}: recipes that rotate different components; give each rotation its own sweep")
    rotated = rotations.pop() if rotations else ()
    checkpoint = rotate(checkpoint, rotated)
    skeleton = checkpoint.skeleton()
    plain = walk(skeleton, checkpoint.family)
    planned = [plan(each, checkpoint, skeleton, plain) for each in found]
    looking = any(each.calibrated for each in planned)
    if looking and request.samples < 1:
        raise VlmqError(f"{request.samples} samples: at least one is needed; choose a larger --samples")
    count = request.samples if looking else 0
    calibrated, asked = _samples(request, checkpoint, count)
    identity = _identity(request, device, checkpoint, planned, calibrated, asked)
    with opened(request.output, identity) as ledger:
        job = Job(request.model, request.revision, rotated, request.task, calibrated, asked, ledger.pieces, device)
        distinct = {each.key: each for each in planned}
        if any(ledger.is_open(key) for key in distinct):
            work = partial(perform, job)
            gpu = device != "cpu"
            with engines.engine(request.engine, work, request.workers, request.address, gpu) as each:
                _measure(list(distinct.values()), ledger, each, request.sequential, progress)
        rows = [tables.row(each, ledger.scores[each.key]) for each in planned if each.key in ledger.scores]
        files = tables.write(rows, request.output, checkpoint.family.name) if rows else ()
        pieces = {piece.key for each in planned for piece in each.pieces}
        failures = {
            each.configuration.name: ledger.failures[each.key]
            for each in planned
            if each.key not in ledger.scores and each.key in ledger.failures
        }
    return Swept(request.output, tuple(rows), failures, len(distinct), len(pieces), files)


def _device(request: Request) -> str:
    """What --device means; VlmqError where it is not there. A cluster has others than this machine."""
    if request.engine == "ray" and ":" in request.device:
        raise VlmqError(f"--device {request.device}: Ray gives each task a GPU of its own; pass --device cuda")
    if request.address and request.device != "auto":
        return request.device
    found = device_of(request.device)
    return found.type if request.device == "auto" else request.device


def _samples(
    request: Request, checkpoint: Checkpoint, count: int
) -> tuple[tuple[Sample, ...], tuple[evaluation.Asked, ...]]:
    """Those to calibrate on, `count`, and those to ask; VlmqError where they share an image."""
    given, seed = request.calibration, request.seed
    if task_of(request.task).official:
        asked = official(request.task, request.data)[: request.questions]
        data = datas.choose(checkpoint, given, None, count, seed, verify=False)
        refuse_leakage(data.digests.values(), [one.sample for one in asked])
    else:
        data = datas.choose(checkpoint, given, request.data, count, seed)
        assert data.evaluation is not None  # for verification was asked for
        asked = asked_of(request.task, data.evaluation.samples)[: request.questions]
    return data.calibration.samples if data.calibration else (), asked


def _measure(planned: Sequence[Planned], ledger: Ledger, each: Each, sequential: bool, progress: Progress) -> None:
    """Every configuration that is open; those that fail once more, when all others are done."""
    for _ in range(ATTEMPTS):
        left = [one for one in planned if ledger.is_open(one.key)]
        broken = {} if sequential else _make_pieces(left, ledger, each, progress)
        tasks: list[Make | Measure] = []
        for one in left:
            faults = [broken[piece.key] for piece in one.pieces if piece.key in broken]
            if faults:
                ledger.append({"key": one.key, "failed": faults[0]})
            elif sequential and one.pieces:
                tasks.append(Measure(one.key, (), one.configuration.recipe))
            else:
                tasks.append(Measure(one.key, one.pieces))
        done = len(planned) - len(tasks)
        progress("configurations", done, len(planned))
        for task, outcome in each(tasks):
            assert isinstance(task, Measure)
            ledger.append({"key": task.key, **outcome})
            done += 1
            progress("configurations", done, len(planned))


def _make_pieces(planned: Iterable[Planned], ledger: Ledger, each: Each, progress: Progress) -> dict[str, str]:
    """Quantize the pieces that are not there; key -> message of those that could not be."""
    pieces = {piece.key: piece for one in planned for piece in one.pieces}
    missing = [Make(piece) for key, piece in pieces.items() if not (ledger.pieces / key).is_dir()]
    done, broken = len(pieces) - len(missing), {}
    for task, outcome in each(missing):
        progress("pieces", done, len(pieces))
        if "failed" in outcome:
            broken[task.piece.key] = f"{task.piece.component}: {outcome['failed']}"
        done += 1
    progress("pieces", done, len(pieces))
    return broken


def perform(job: Job, task: Make | Measure) -> Outcome:
    """One task, in whichever process."""
    bench = _bench(job)
    match task:
        case Make(piece):
            bench.make(piece)
            return {}
        case Measure(_, pieces, None):
            return {"scores": bench.score(pieces, _asked(job))}
        case Measure(_, _, recipe):
            assert recipe is not None
            return {"scores": bench.score_in_sequence(recipe, _asked(job))}


@lru_cache(maxsize=1)
def _bench(job: Job) -> Bench:
    device = device_of(job.device)
    return Bench(job.model, job.revision, job.rotate, job.calibration, job.pieces, device)


@lru_cache(maxsize=1)
def _asked(job: Job) -> Asked:
    return _bench(job).ask(job.task, job.evaluation)


def _identity(
    request: Request,
    device: str,
    checkpoint: Checkpoint,
    planned: Iterable[Planned],
    calibration: Iterable[Sample],
    asked: Iterable[evaluation.Asked],
) -> dict[str, Any]:
    """What the rows depend on, by the words that a person is told where it is another."""
    source = manifest.source(checkpoint.folder, checkpoint.name, checkpoint.revision)
    files = [checkpoint.folder / name for name in ("config.json", *companions(checkpoint.folder))]
    return {
        "version": [vlmq.__version__, torch.__version__, transformers.__version__],
        "model": source.model_dump(mode="json")["files"],
        "configuration of the model": {file.name: sha256(file.read_bytes()).hexdigest() for file in files},
        "grid": [[one.configuration.name, one.configuration.series, one.key] for one in planned],
        "task": request.task,
        "device": device.partition(":")[0],
        "calibration": _said(calibration),
        "data": _said(one.sample for one in asked),
        "calibration of components": "in sequence" if request.sequential else "alone",
    }


def _said(samples: Iterable[Sample]) -> str:
    """A digest of all that is read of samples, of which a sweep may have hundreds of thousands."""
    samples = tuple(samples)
    digests = image_digests(samples)
    found = sha256()
    for sample in samples:
        found.update(repr((sample.kind, sample.text, sample.answers, digests.get(sample.id))).encode())
    return found.hexdigest()
