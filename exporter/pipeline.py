"""The way of the data, from a checkpoint to a verified export; each step is one call.

checkpoint -> walk -> calibrate -> quantize -> pack -> write -> verify
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import transformers
from torch import nn

import vlmq
from vlmq.exporter import consumers, ends, release, workers
from vlmq.exporter import data as datas
from vlmq.exporter.activations import MEMORY, Activations
from vlmq.exporter.calibration import Calibration, prepared
from vlmq.exporter.checkpoint import Checkpoint, open_checkpoint, refuse_altered
from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.devices import device_of
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import report
from vlmq.exporter.evaluation.memory import peak
from vlmq.exporter.evaluation.thresholds import refuse_unknown
from vlmq.exporter.evaluation.verify import Verdict, verify
from vlmq.exporter.journal import journaled
from vlmq.exporter.load import load
from vlmq.exporter.methods.registry import is_calibrated
from vlmq.exporter.planning import plan as planning
from vlmq.exporter.planning.workload import Workload
from vlmq.exporter.progress import Progress, silent
from vlmq.exporter.quantize import needs_reference, quantize, refuse_for_workers
from vlmq.exporter.recipe import Assignment, Recipe
from vlmq.exporter.release import Release
from vlmq.exporter.rotation import rotate
from vlmq.exporter.runtime import open_processor
from vlmq.exporter.samples import COUNT, Samples, ids_sha256
from vlmq.exporter.solving import QuantizedBlock
from vlmq.exporter.walk import Walk
from vlmq.exporter.writing import Written, write_weights
from vlmq.formats import card, compressed_tensors, genai, manifest, onnx_graphs, onnx_weights, transformers_js
from vlmq.formats.folder import companions, copy_companions, refuse_place, staged
from vlmq.formats.shards import MAX_SHARD_BYTES

Formats = Literal["safetensors", "onnx", "both"]


@dataclass(frozen=True)
class Request:
    """All that an export depends on.

    activation_memory: bytes of hidden states that wait in memory; beyond it they wait on the disk, beside the output.
    thresholds: of the verdict, by name, where they are not the defaults (evaluation/thresholds.py).
    fresh: begin anew where an earlier run was stopped. gate: load what was written with transformers, and compare.
    device: where blocks are solved (devices.py). calibrate_in: the dtype in which blocks multiply what samples give.
    """

    model: str
    output: Path
    recipe: Recipe = field(default_factory=Recipe)
    revision: str | None = None
    formats: Formats = "both"
    accuracy_level: int = 0
    calibration: str | None = None
    samples: int = COUNT
    seed: int = 0
    text_only: bool = False
    verify: bool = True
    data: str | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    max_shard_bytes: int = MAX_SHARD_BYTES
    activation_memory: int = MEMORY
    fresh: bool = False
    gate: bool = True
    device: str = "auto"
    calibrate_in: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Exported:
    """The finished folder, what is in it, and whether it answers as the reference did (None: not asked).

    release: what transformers made of it (None: not asked, or no safetensors); where that is not as it must be, nothing
    was verified. note: what a person must know who loads it with transformers' own reader. planned_memory, peak_memory:
    the bytes that this process was expected to need, and had at its peak.
    """

    folder: Path
    manifest: manifest.Manifest
    verdict: Verdict | None
    note: str | None
    planned_memory: int
    peak_memory: int
    release: Release | None = None


def export(
    request: Request,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda line: None,
) -> Exported | None:
    """Run the whole way; VlmqError or FormatError, in one line, where it cannot be gone.

    tell: is given a line, before the work, for each thing that the recipe's consumer takes in full precision alone.

    None on a worker that torchrun started beside the first: that one alone writes and verifies.
    """
    with workers.together():
        return _export(request, progress, tell)


def _export(request: Request, progress: Progress, tell: Callable[[str], None]) -> Exported | None:
    refuse_place(request.output)
    consumers.refuse_format(request.recipe.consumer, request.formats)
    refuse_unknown(request.thresholds)
    device = device_of(request.device)
    checkpoint = rotate(open_checkpoint(request.model, request.revision), request.recipe.rotate)
    model = checkpoint.skeleton()
    plan = ends.plan(checkpoint, model, request.recipe)
    assignment = request.recipe.assign(plan)
    refuse_for_workers(assignment)
    _refuse_coarse(request, assignment)
    needed = _planned(request, checkpoint, model, plan, assignment)
    planning.refuse(needed)
    for line in assignment.told:
        tell(line)
    data = datas.choose(
        checkpoint,
        request.calibration,
        request.data,
        _samples(request, assignment),
        request.seed,
        request.text_only,
        request.verify,
    )
    source = manifest.source(checkpoint.folder, checkpoint.name, checkpoint.revision)
    refuse_altered(checkpoint.folder, source.files)
    identity = _identity(request, checkpoint, source, data) | {"device": device.type}
    with (
        journaled(request.output, identity, request.activation_memory, request.fresh) as journal,
        ExitStack() as staging,
    ):
        workers.admit()
        calibration = _calibration(request, checkpoint, model, assignment, data.calibration, journal.activations)
        # A run that looks at no samples is over as soon as its weights are read: its journal would cost more than it.
        kept = journal if calibration else None
        blocks = quantize(checkpoint, model, plan, assignment, calibration, progress, kept, device)
        if workers.rank():
            deque(blocks, maxlen=0)  # its part in them is done as they are made
            return None
        folder = staging.enter_context(staged(request.output))
        if request.formats == "onnx":
            with TemporaryDirectory(dir=folder) as beside:
                written = _write_safetensors(request, checkpoint, blocks, assignment, Path(beside))
                _write_onnx(Path(beside), folder, request.accuracy_level, progress)
            copy_companions(checkpoint.folder, folder, changes=checkpoint.changes)
        else:
            written = _write_safetensors(request, checkpoint, blocks, assignment, folder)
            if request.formats == "both":
                _write_onnx(folder, folder, request.accuracy_level, progress)
        if request.formats != "safetensors":
            transformers_js.complete(folder)
        made = _manifest(request, source, checkpoint, assignment, data, written, folder)
        manifest.write(folder, made)
        card.write(folder)  # of what is known by then; written again when more was measured
    found = release.conclude(request.output, request.gate, progress)
    verdict = None
    if data.evaluation and (found is None or found.ok):
        verdict = verify(
            request.output, checkpoint.folder, data.evaluation.samples, request.thresholds, progress=progress
        )
        report.write(verdict, request.output)
        card.write(request.output)
    note = None if request.formats == "onnx" else compressed_tensors.caveat(written.grids, ends.find(model).embedding)
    return Exported(request.output, made, verdict, note, needed.peak.bytes, peak(), found)


def plan(request: Request) -> planning.Plan:
    """What the export of a request will make and need; the model's configuration is enough.

    VlmqError for a recipe that is not meant for the model.
    """
    consumers.refuse_format(request.recipe.consumer, request.formats)
    checkpoint = rotate(open_checkpoint(request.model, request.revision, weights=False), request.recipe.rotate)
    model = checkpoint.skeleton()
    walk = ends.plan(checkpoint, model, request.recipe)
    assignment = request.recipe.assign(walk)
    return _planned(request, checkpoint, model, walk, assignment)


def _planned(
    request: Request, checkpoint: Checkpoint, model: nn.Module, walk: Walk, assignment: Assignment
) -> planning.Plan:
    samples = _samples(request, assignment)
    formats, memory = request.formats, request.activation_memory
    level = request.accuracy_level
    work = Workload(checkpoint, model, walk, assignment, samples, formats, request.verify, memory, request.gate, level)
    return planning.plan(work, request.output)


def _samples(request: Request, assignment: Assignment) -> int:
    """How many samples are calibrated on: none where no method looks at any."""
    looking = next((name for name, scheme in assignment.schemes.items() if is_calibrated(scheme)), None)
    if looking and request.samples < 1:
        raise VlmqError(
            f"{request.samples} samples: {looking} needs at least one to be calibrated; choose a larger --samples"
        )
    return request.samples if looking else 0


def verify_folder(
    folder: Path,
    reference: str | None = None,
    data: str | None = None,
    thresholds: Mapping[str, float] | None = None,
    progress: Progress = silent,
    cache: Path | None = None,
    gate: bool = True,
) -> tuple[Verdict, Release | None]:
    """Verify an export again, against the checkpoint its manifest names and on its data, unless others are named.

    thresholds, cache: as `evaluation.verify.verify` has them. gate: have transformers load it, too.
    """
    made = manifest.read(folder)
    checkpoint = open_checkpoint(reference or made.source.name, None if reference else made.source.revision)
    if reference is None and manifest.source(checkpoint.folder, checkpoint.name).files != made.source.files:
        raise VlmqError(
            f"{checkpoint.folder}: not the weights that {folder} was made from; name those with --reference"
        )
    is_demo = made.source.name in CHECKPOINTS or (made.calibration and made.calibration.dataset == datas.DEMO)
    samples = datas.evaluation_set(data or (datas.DEMO if is_demo else None))
    verdict = verify(folder, checkpoint.folder, samples.samples, thresholds, progress=progress, cache=cache)
    report.write(verdict, folder)
    return verdict, release.conclude(folder, gate, progress)


def _refuse_coarse(request: Request, assignment: Assignment) -> None:
    """VlmqError where bfloat16, of 8 significant bits, could not tell the levels of a rounded input apart."""
    rounded = next((name for name, scheme in assignment.schemes.items() if scheme.inputs), None)
    if rounded and request.calibrate_in == "bfloat16":
        raise VlmqError(
            f"{rounded}: its input is rounded, which --calibrate-in bfloat16 is too coarse for; leave it at float32"
        )


def _identity(request: Request, checkpoint: Checkpoint, source: manifest.Source, data: datas.Data) -> dict[str, Any]:
    """What the quantized blocks depend on, as a journal tells it: a run goes on only where it all is the same."""
    samples = data.calibration
    return {
        "version": [vlmq.__version__, torch.__version__, transformers.__version__],
        "source": source.model_dump(mode="json")["files"],
        "configuration": {
            name: sha256((checkpoint.folder / name).read_bytes()).hexdigest()
            for name in ("config.json", *companions(checkpoint.folder))
        },
        "recipe": request.recipe.content(),
        "calibration": samples
        and [
            [sample.kind, sample.text, *sample.answers[:1], data.digests.get(sample.id)] for sample in samples.samples
        ],
        "dtype of the calibration": request.calibrate_in,
        "number of workers": workers.count(),
    }


def _calibration(
    request: Request,
    checkpoint: Checkpoint,
    model: nn.Module,
    assignment: Assignment,
    samples: Samples | None,
    activations: Activations,
) -> Calibration | None:
    if samples is None:
        return None
    batches = prepared(samples.samples, open_processor(checkpoint.folder), checkpoint.family, activations)
    return Calibration(model, batches, needs_reference(assignment), activations, getattr(torch, request.calibrate_in))


def _write_safetensors(
    request: Request, checkpoint: Checkpoint, blocks: Iterable[QuantizedBlock], assignment: Assignment, folder: Path
) -> Written:
    written = write_weights(checkpoint, blocks, folder, request.max_shard_bytes)
    kept = {*assignment.kept, *(set(assignment.schemes) - set(written.grids))}
    aliases = consumers.aliases(request.recipe.consumer, {*written.grids, *kept})
    config = compressed_tensors.quantization_config(written.grids, kept, aliases)
    copy_companions(checkpoint.folder, folder, config, checkpoint.changes)
    return written


def _write_onnx(weights: Path, folder: Path, accuracy_level: int, progress: Progress) -> None:
    progress("ONNX graphs", 0, 1)
    model = load(weights)
    onnx_graphs.export(model, folder, accuracy_level)
    genai.write(folder, model.config)
    progress("ONNX graphs", 1, 1)


def _manifest(
    request: Request,
    source: manifest.Source,
    checkpoint: Checkpoint,
    assignment: Assignment,
    data: datas.Data,
    written: Written,
    folder: Path,
) -> manifest.Manifest:
    def on_disk(module: str) -> str:
        place = checkpoint.places.get(f"{module}.weight")  # a tied head has no tensor of its own
        return place.name.removesuffix(".weight") if place else module

    samples = data.calibration
    calibration = samples and manifest.Calibration(
        dataset=samples.source,
        count=len(samples.samples),
        seed=request.seed,
        ids_sha256=ids_sha256(samples.samples),
        images_sha256=data.digests,
    )
    return manifest.Manifest(
        vlmq=vlmq.__version__,
        source=source,
        family=checkpoint.family.name,
        recipe=request.recipe.content(),
        calibration=calibration,
        tensors=written.records,
        kept={on_disk(module): reason for module, reason in assignment.kept.items()},
        files=manifest.describe(folder),
        onnx=None
        if request.formats == "safetensors"
        else {"accuracy_level": request.accuracy_level, "linears": onnx_weights.summary(folder)},
    )
