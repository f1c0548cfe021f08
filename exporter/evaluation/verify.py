"""The verdict: does the exported model answer as the reference did?

Both answer the same samples, each in processes of its own (`measure.py`), never two models in memory at once. The
export is run in the engine its folder is meant for; its component outputs are compared in torch as well, where the
vision tower can be seen by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import vqa
from vlmq.exporter.evaluation.components import cosine
from vlmq.exporter.evaluation.measure import Measurement, Memory, measure
from vlmq.exporter.evaluation.statistics import PairedDifference, paired_difference
from vlmq.exporter.progress import Progress
from vlmq.exporter.runtime import Engine, engine_of
from vlmq.exporter.samples import Sample, refuse_leakage
from vlmq.formats import manifest
from vlmq.formats.errors import FormatError

# Points of accuracy that an export may lose, by the fewest bits of any of its weights. At 3 bits round-to-nearest
# alone loses two to five on models with outlier channels; at 2 every method loses much, and the report is the point.
MAX_DROP: Mapping[int, float] = {2: 100.0, 3: 5.0}
MAX_DROP_FROM_4_BITS = 2.0

# Without answers to score, a component whose outputs point elsewhere altogether is what can be told.
MIN_COSINE = 0.8
TURNED = {"vision": "vision", "language": "connector"}  # rotated component -> whose outputs lie in the turned stream
BITS_WITH_MIN_COSINE = 4


@dataclass(frozen=True)
class Score:
    """Accuracy in percent of the questions of one answer type, and what the export changed."""

    reference: float
    export: float
    difference: PairedDifference


@dataclass(frozen=True)
class Side:
    """What one of the two models takes."""

    folder: str
    engine: Engine
    threads: int
    disk: dict[str, int]  # bytes of weights by format: safetensors, onnx
    memory: Memory
    seconds_per_answer: float | None


@dataclass(frozen=True)
class Verdict:
    """Everything that was compared, and every threshold that was missed."""

    samples: int
    images: int
    bits: int  # the fewest of any quantized weight
    accuracy: dict[str, Score]  # `overall`, then by answer type; empty without annotated answers
    token_agreement: float  # share of the answers whose tokens are identical
    cosine: dict[str, dict[str, float]]  # engine -> component -> mean cosine of its outputs to the reference's
    reference: Side
    export: Side
    max_drop: float
    misses: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.misses


def max_drop_at(bits: int) -> float:
    """Points that an export with weights of so many bits may lose unless `--max-drop` says otherwise."""
    return MAX_DROP.get(bits, MAX_DROP_FROM_4_BITS)


def verify(
    folder: Path,
    reference: Path,
    samples: Sequence[Sample],
    max_drop: float | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Compare the export in `folder` with the checkpoint it was made from, on samples it was not calibrated on.

    Samples with annotated answers are scored, and only they are answered; where none has any, all are answered and
    compared. VlmqError for leakage, for no samples, and where a model cannot be run.
    """
    made = manifest.read(folder)
    samples = _to_answer(samples)
    if made.calibration:
        refuse_leakage(made.calibration.images_sha256.values(), samples)
    engine = engine or engine_of(folder)

    def telling(stage: str) -> Callable[[int, int], None]:
        return lambda done, of: progress(stage, done, of) if progress else None

    before = measure(reference, "torch", samples, progress=telling("reference"))
    after = measure(folder, engine, samples, progress=telling("export"))
    outputs = {engine: after.outputs}
    if engine != "torch" and _weights(folder)["safetensors"]:
        outputs["torch"] = measure(folder, "torch", samples, answer=False).outputs

    bits = min((record.bits for record in made.tensors.values()), default=16)
    accuracy = compare_answers(samples, before, after)
    turned = {TURNED[component] for component in made.recipe.get("rotate", ())}
    cosines = {
        name: {
            component: cosine(before.outputs[component], output)
            for component, output in found.items()
            if component not in turned
        }
        for name, found in outputs.items()
    }
    allowed = max_drop_at(bits) if max_drop is None else max_drop
    return Verdict(
        samples=len(samples),
        images=len({sample.image for sample in samples}),
        bits=bits,
        accuracy=accuracy,
        token_agreement=_share_equal(before.tokens, after.tokens),
        cosine=cosines,
        reference=_side(reference, before),
        export=_side(folder, after),
        max_drop=allowed,
        misses=(*_coverage(folder), *judge(accuracy, cosines, bits, allowed)),
    )


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


def judge(
    accuracy: Mapping[str, Score], cosines: Mapping[str, Mapping[str, float]], bits: int, max_drop: float
) -> list[str]:
    """One line for every threshold missed."""
    if accuracy:
        drop = -accuracy["overall"].difference.points
        return [f"accuracy fell by {drop:.2f} points, more than the {max_drop:g} allowed"] if drop > max_drop else []
    if bits < BITS_WITH_MIN_COSINE:
        return []
    return [
        f"{component}: its outputs in {engine} have a cosine of {value:.3f} to the reference's, less than {MIN_COSINE}"
        for engine, found in cosines.items()
        for component, value in found.items()
        if value < MIN_COSINE
    ]


def _coverage(folder: Path) -> list[str]:
    """What the files lack of the manifest, or have besides."""
    try:
        manifest.coverage(folder)
    except FormatError as fault:
        return [str(fault)]
    return []


def _to_answer(samples: Sequence[Sample]) -> list[Sample]:
    scored = [sample for sample in samples if sample.answers and sample.kind != "caption"]
    chosen = scored or [Sample(sample.id, sample.image, sample.kind, sample.text) for sample in samples]
    if not chosen:
        raise VlmqError("no samples to evaluate on; name some with --data")
    return chosen


def _share_equal(first: list[list[int]], second: list[list[int]]) -> float:
    return sum(one == two for one, two in zip(first, second, strict=True)) / len(first)


def _side(folder: Path, found: Measurement) -> Side:
    return Side(folder.name, found.engine, found.threads, _weights(folder), found.memory, found.seconds_per_answer)


def _weights(folder: Path) -> dict[str, int]:
    """Bytes of weights on disk by format; both are whole models, so they do not add up."""
    graphs = folder / "onnx"
    return {
        "safetensors": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "onnx": sum(path.stat().st_size for path in graphs.rglob("*") if path.is_file()) if graphs.is_dir() else 0,
    }
