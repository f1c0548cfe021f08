"""What an export may lose, by the fewest bits of any of its weights or rounded inputs, and which of that it lost.

The defaults are two to five times what 514 measured exports of both demos show where accuracy held, methods and
outlier variants of all kinds (benchmarks/results/methods.jsonl): there the divergence is up to 0.003 nats at 8 bits,
0.08 at 4, 0.1 at 3. At 2 bits every method loses much, and the report is the point. A person may set any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from vlmq.exporter.errors import VlmqError

if TYPE_CHECKING:
    from vlmq.exporter.evaluation.distance import Distance
    from vlmq.exporter.evaluation.verify import Verdict


@dataclass(frozen=True)
class Threshold:
    """A limit; `by_bits` are its defaults from so many bits on, None: none is demanded."""

    at_most: bool
    unit: str
    meaning: str
    by_bits: Mapping[int, float | None]

    def default(self, bits: int) -> float | None:
        return self.by_bits[max(known for known in self.by_bits if known <= bits)]


def _most(unit: str, meaning: str, by_bits: Mapping[int, float | None]) -> Threshold:
    return Threshold(True, unit, meaning, by_bits)


def _least(unit: str, meaning: str, by_bits: Mapping[int, float | None]) -> Threshold:
    return Threshold(False, unit, meaning, by_bits)


COSINE: Mapping[int, float | None] = {2: None, 3: 0.7, 4: 0.85, 5: 0.95, 8: 0.97}
UNSET: Mapping[int, float | None] = {2: None}

THRESHOLDS: Mapping[str, Threshold] = {
    "max-drop": _most("points", "accuracy lost", {2: 100, 3: 5, 4: 2}),
    "kl": _most("nats", "divergence of a token from the reference", {2: None, 3: 0.3, 4: 0.1, 5: 0.05, 8: 0.02}),
    "top1": _least("%", "tokens that are the likeliest in both models", {2: None, 3: 80, 4: 90, 5: 94, 8: 97}),
    "tokens": _least("%", "answers with the reference's tokens", UNSET),
    "sensitivity": _most(
        "points", "answers that other images change, more or fewer", {2: None, 3: 20, 4: 12.5, 5: 10, 8: 10}
    ),
    **{
        f"cosine-{part}": _least("", f"cosine of what the {part} puts out", COSINE)
        for part in ("vision", "connector", "language")
    },
    **{
        f"error-{part}": _most("", f"relative error of what the {part} puts out", UNSET)
        for part in ("vision", "connector", "language")
    },
    "steps": _most("steps", "distance of a weight from the source's, over its whole matrix", {2: 0.9}),
    "shift": _most("steps", "mean distance over one group of a weight", {2: 0.75, 5: None}),
    "columns": _most("standard errors", "scales of a weight's columns against those that were folded", {2: 5}),
}

# Of every quantized weight, by its own bits.
OF_WEIGHTS = ("steps", "shift", "columns")

Limits = Mapping[str, float | None]


def limits(bits: int, given: Mapping[str, float]) -> Limits:
    """Every threshold of an export, defaults and what a person set; errors as `refuse_unknown` has them."""
    refuse_unknown(given)
    return {name: given.get(name, threshold.default(bits)) for name, threshold in THRESHOLDS.items()}


def refuse_unknown(given: Iterable[str]) -> None:
    """VlmqError for the first name that is no threshold's."""
    for name in given:
        if name not in THRESHOLDS:
            near = get_close_matches(name, THRESHOLDS, 1)
            remedy = f"did you mean {near[0]}?" if near else f"choose of {', '.join(THRESHOLDS)}"
            raise VlmqError(f"--threshold {name}: no such threshold; {remedy}")


def judge(verdict: Verdict) -> Iterator[str]:
    """One line for every threshold missed, its name first; what is no number misses."""
    for name, where, value in measured(verdict):
        limit, threshold = verdict.thresholds[name], THRESHOLDS[name]
        if limit is None or (value <= limit if threshold.at_most else value >= limit):
            continue
        than = "more" if threshold.at_most else "less"
        unit = f" {threshold.unit}" if threshold.unit else ""
        word = "allowed" if threshold.at_most else "demanded"
        yield f"{name}: {where}{threshold.meaning}: {value:.4g}{unit}, {than} than the {limit:g} {word}"


def measured(verdict: Verdict) -> Iterator[tuple[str, str, float]]:
    """Every value that has a threshold: its name, where it was measured, the value."""
    if verdict.accuracy:
        drop = 0.0 - verdict.accuracy["overall"].difference.points  # no minus before a zero
        yield "max-drop", "", drop
    if verdict.export is not None:
        yield "tokens", "", 100 * verdict.token_agreement
    for engine, found in verdict.likeness.items():
        yield "kl", f"{engine}: ", found.divergence.kl
        yield "top1", f"{engine}: ", found.divergence.top1
        for shown, (before, after) in found.sensitivity.items():
            what = f"{engine}: {shown} images change {after:.1f} % of the answers, {before:.1f} % of the reference's: "
            yield "sensitivity", what, abs(after - before)
        for component, value in found.cosine.items():
            yield f"cosine-{component}", f"{engine}: ", value
        for component, value in found.error.items():
            yield f"error-{component}", f"{engine}: ", value


def far_off(
    distances: Mapping[str, Mapping[str, Distance]], bits: Mapping[str, int], given: Mapping[str, float]
) -> Iterator[str]:
    """Of each format the weight that lies farthest beyond what its own bits allow, and how many more there are."""
    for kind, found in distances.items():
        for name in OF_WEIGHTS:
            limit = {module: limits(bits[module], given)[name] for module in found}
            off = {module: getattr(distance, name) for module, distance in found.items()}
            beyond = [module for module in off if (most := limit[module]) is not None and not off[module] <= most]
            if beyond:
                worst = max(beyond, key=lambda module: off[module])
                more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
                threshold = THRESHOLDS[name]
                yield (
                    f"{name}: {worst}{more} in {kind}: {threshold.meaning}: {off[worst]:.3g} {threshold.unit}, "
                    f"more than the {limit[worst]:g} allowed"
                )
