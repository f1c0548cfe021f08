"""The verdict: does the exported model answer as the reference did?

First its files are audited against the source (`audit.py`). Then both models answer the same samples, each in
processes of its own (`measure.py`), never two models in memory at once: the reference once, the export in each engine
that its folder has files for. What every answer, output and tensor differs by meets its threshold (`thresholds.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import thresholds, vqa
from vlmq.exporter.evaluation.audit import Audit, audit
from vlmq.exporter.evaluation.cache import reference_folder
from vlmq.exporter.evaluation.examples import Example, examples
from vlmq.exporter.evaluation.likeness import Likeness, likeness
from vlmq.exporter.evaluation.measure import Measurement, Memory, measure
from vlmq.exporter.evaluation.speed import Speed
from vlmq.exporter.evaluation.statistics import PairedDifference, paired_difference
from vlmq.exporter.progress import Progress
from vlmq.exporter.runtime import Engine, engine_of
from vlmq.exporter.samples import Sample, refuse_leakage
from vlmq.formats import manifest


@dataclass(frozen=True)
class Score:
    """Accuracy in percent of the questions of one answer type, and what the export changed."""

    reference: float
    export: float
    difference: PairedDifference


@dataclass(frozen=True)
class Side:
    """What one of the models takes, in one engine."""

    folder: str
    engine: Engine
    threads: int
    disk: dict[str, int]  # bytes of weights by format: safetensors, onnx; each is a whole model
    memory: Memory
    seconds_per_answer: float | None
    speed: Speed | None = None


@dataclass(frozen=True)
class Verdict:
    """Everything that was compared, and every threshold that was missed."""

    samples: int
    images: int
    bits: int  # the fewest of any quantized weight or rounded input
    accuracy: dict[str, Score]  # `overall`, then by answer type; empty without annotated answers
    token_agreement: float  # share of the answers whose tokens are identical
    reference: Side
    export: Side | None  # in the engine that the folder is meant for; None where it could not be run
    likeness: dict[Engine, Likeness] = field(default_factory=dict)
    others: tuple[Side, ...] = ()  # the export in the other engine
    weights: dict[str, dict[str, float]] = field(default_factory=dict)  # format -> block -> steps its weights are off
    compared: dict[str, int] = field(default_factory=dict)  # tensors of the source found again, by format
    disk: dict[str, dict[str, int]] = field(default_factory=dict)  # bytes by format and component
    source_disk: dict[str, int] = field(default_factory=dict)  # the reference's bytes by component
    thresholds: thresholds.Limits = field(default_factory=dict)
    misses: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.misses


def verify(
    folder: Path,
    reference: Path,
    samples: Sequence[Sample],
    given: Mapping[str, float] | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> Verdict:
    """Compare the export in `folder` with the checkpoint it was made from, on samples it was not calibrated on.

    Samples with annotated answers are scored, and only they are answered; where none has any, all are answered and
    compared. given: thresholds that are not the defaults. cache: where the measurement of a reference is kept, and
    taken from, all but its times. VlmqError for leakage, for no samples, for an image that cannot be read, for an
    unknown threshold, and where the reference cannot be run.
    """
    made = manifest.read(folder)
    bits = fewest_bits(made)
    limits = thresholds.limits(bits, given or {})
    samples = to_answer(samples)
    refuse_leakage(made.calibration.images_sha256.values() if made.calibration else (), samples)
    found, told = audited(folder, reference, given or {})
    first = engine or engine_of(folder)
    engines: list[Engine] = [first, *(other for other in _others(folder) if other != first)]

    def telling(stage: str) -> Callable[[int, int], None]:
        return lambda done, of: progress(stage, done, of) if progress else None

    with TemporaryDirectory(prefix="vlmq-verify-") as work:
        with reference_folder(cache, reference, samples, Path(work)) as (kept, known):
            if known:
                before = replace(known, speed=None)  # of another run, on a machine that may have been busier
            else:
                before = measure(reference, "torch", samples, kept, timed_last=True, progress=telling("reference"))
        verdict = Verdict(
            samples=len(samples),
            images=len({sample.image for sample in samples}),
            bits=bits,
            accuracy={},
            token_agreement=0.0,
            reference=_side(reference, before),
            export=None,
            weights=_by_block(found),
            compared=found.compared,
            disk=found.disk,
            source_disk=found.source_disk,
            thresholds=limits,
        )
        failed = []
        for each in engines:
            into = Path(work) / each
            into.mkdir()
            try:
                after = measure(
                    folder,
                    each,
                    samples,
                    into,
                    answer=each == first,
                    forced=before.shown.own,
                    progress=telling("export" if each == first else f"export in {each}"),
                )
            except VlmqError as fault:
                failed.append(f"runs: {fault}")
                continue
            verdict = _with(verdict, folder, samples, made, before, after, scored=each == first)
    return replace(verdict, misses=(*told, *failed, *thresholds.judge(verdict)))


def audited(folder: Path, reference: Path, given: Mapping[str, float] | None = None) -> tuple[Audit, list[str]]:
    """What an export's files are found to be, and the misses among that; neither model is run."""
    found = audit(folder, reference)
    tensors = manifest.read(folder).tensors
    bits = {module: tensors[module].bits for distances in found.distances.values() for module in distances}
    return found, [*map(str, found.faults), *thresholds.far_off(found.distances, bits, given or {})]


def _with(
    verdict: Verdict,
    folder: Path,
    samples: Sequence[Sample],
    made: manifest.Manifest,
    before: Measurement,
    after: Measurement,
    scored: bool,
) -> Verdict:
    """The verdict with one more engine's measurement in it; the one that answered all samples is `scored`."""
    found = likeness(before, after, made.recipe.get("rotate", ()))
    verdict = replace(verdict, likeness={**verdict.likeness, after.engine: found})
    if not scored:
        return replace(verdict, others=(*verdict.others, _side(folder, after)))
    return replace(
        verdict,
        export=_side(folder, after),
        accuracy=compare_answers(samples, before, after),
        token_agreement=_share_equal(before.tokens, after.tokens),
        examples=examples(samples, before, after),
    )


def fewest_bits(made: manifest.Manifest) -> int:
    found = [bits for record in made.tensors.values() for bits in (record.bits, record.inputs and record.inputs.bits)]
    return min((bits for bits in found if bits), default=16)


def _others(folder: Path) -> list[Engine]:
    """The engines that the folder has files for."""
    return (["torch"] if any(folder.glob("*.safetensors")) else []) + (["onnx"] if (folder / "onnx").is_dir() else [])


def compare_answers(samples: Sequence[Sample], before: Measurement, after: Measurement) -> dict[str, Score]:
    """Scores overall and by answer type; none where the samples have no annotated answers."""
    if not samples[0].answers:
        return {}
    first, second = (
        [vqa.accuracy(text, sample.answers) for text, sample in zip(found.texts, samples, strict=True)]
        for found in (before, after)
    )
    images = [sample.image for sample in samples]

    def score(places: list[int]) -> Score:
        one, two = [first[place] for place in places], [second[place] for place in places]
        difference = paired_difference(one, two, [images[place] for place in places])
        return Score(100 * sum(one) / len(one), 100 * sum(two) / len(two), difference)

    places = vqa.by_answer_type([sample.answer_type for sample in samples])
    return {kind: score(members) for kind, members in places.items()}


def _by_block(audited: Audit) -> dict[str, dict[str, float]]:
    """Root mean squares over the linears of each block."""
    found: dict[str, dict[str, float]] = {}
    for kind, distances in audited.distances.items():
        blocks: dict[str, list[float]] = {}
        for module, distance in distances.items():
            blocks.setdefault(audited.blocks[module], []).append(distance.error)
        found[kind] = {block: sum(each) / len(each) for block, each in blocks.items()}
    return found


def to_answer(samples: Sequence[Sample]) -> list[Sample]:
    """The samples that are scored, or all of them, without their captions, where none is."""
    scored = [sample for sample in samples if sample.answers and sample.kind != "caption"]
    chosen = scored or [Sample(sample.id, sample.image, sample.kind, sample.text) for sample in samples]
    if not chosen:
        raise VlmqError("no samples to evaluate on; name some with --data")
    return chosen


def _share_equal(first: list[list[int]], second: list[list[int]]) -> float:
    return sum(one == two for one, two in zip(first, second, strict=True)) / len(first)


def _side(folder: Path, found: Measurement) -> Side:
    return Side(
        folder.name, found.engine, found.threads, _weights(folder), found.memory, found.seconds_per_answer, found.speed
    )


def _weights(folder: Path) -> dict[str, int]:
    """Bytes of weights on disk by format; both are whole models, so they do not add up."""
    graphs = folder / "onnx"
    return {
        "safetensors": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "onnx": sum(path.stat().st_size for path in graphs.rglob("*") if path.is_file()) if graphs.is_dir() else 0,
    }
