"""How like the reference an export is in one engine: what its components put out, and what it would say."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vlmq.exporter.evaluation.components import cosine, relative_error
from vlmq.exporter.evaluation.divergence import Divergence, divergence
from vlmq.exporter.evaluation.measure import Measurement
from vlmq.exporter.evaluation.speed import ratio

COMPONENTS = ("vision", "connector", "language")
TURNED = {"vision": "vision", "language": "connector"}  # rotated component -> whose outputs lie in the turned stream
BLOCK = "block:"


@dataclass(frozen=True)
class Likeness:
    """Of the probes. What a rotation turned is not compared: it lies in another basis."""

    cosine: dict[str, float]  # by component
    error: dict[str, float]  # relative, by component
    blocks: dict[str, float]  # relative error of what each block puts out; torch only
    divergence: Divergence
    sensitivity: dict[str, tuple[float, float]]  # percent of answers changed: the reference's, the export's
    answers: float  # share of the probes' answers whose tokens are identical
    faster: dict[str, float]  # times, median over pairs: answer, first_token, token, image


def likeness(before: Measurement, after: Measurement, rotated: Collection[str]) -> Likeness:
    """after: a measurement that followed the answers of `before`."""
    turned = {TURNED[component] for component in rotated}
    parts = [part for part in COMPONENTS if part in before.outputs and part in after.outputs and part not in turned]
    cosines, errors = {}, {}
    for part in parts:
        one, two = before.outputs[part], after.outputs[part]
        cosines[part], errors[part] = cosine(one, two), relative_error(one, two)
    blocks = {
        name.removeprefix(BLOCK): relative_error(before.outputs[name], after.outputs[name])
        for name in before.outputs
        if name.startswith(BLOCK) and name in after.outputs and not _is_turned(name, rotated)
    }
    old, new = before.shown.changed(), after.shown.changed()
    same = [one == two for one, two in zip(before.shown.own, after.shown.own, strict=True)]
    faster = {}
    if before.speed and after.speed:
        kinds = ("answer", "first_token", "token", "image")
        faster = {kind: ratio(getattr(before.speed, kind), getattr(after.speed, kind)) for kind in kinds}
    return Likeness(
        cosine=cosines,
        error=errors,
        blocks=blocks,
        divergence=divergence(before.outputs["logits"], after.outputs["logits"], before.lengths),
        sensitivity={kind: (old[kind], new[kind]) for kind in old},
        answers=sum(same) / max(1, len(same)),
        faster=faster,
    )


def _is_turned(block: str, rotated: Collection[str]) -> bool:
    """Whether a block's output lies in a rotated stream: its component's, or the projection's that writes into it."""
    vision = "vision" in rotated and ("vision_model." in block or "vision_tower." in block)
    projected = block.endswith(("language_projection", "multi_modal_projector"))
    spoken = "language_model." in block or projected
    return vision or ("language" in rotated and spoken)
