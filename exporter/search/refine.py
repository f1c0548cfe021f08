"""Predictions held against measurements: each component quantized alone, at few bits, and the answers' divergence.

What was measured, divided by what was predicted, is a factor for the costs of that component: it makes up for what the
second order leaves out, where errors are large, and for answers that cannot diverge further.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vlmq.exporter import ends
from vlmq.exporter.calibration import Inputs
from vlmq.exporter.families import Component
from vlmq.exporter.progress import Progress
from vlmq.exporter.recipe import Recipe
from vlmq.exporter.search.bench import Bench
from vlmq.exporter.search.fisher import divergence, log_probabilities
from vlmq.exporter.search.grid import Configuration
from vlmq.exporter.search.pieces import Piece, plan
from vlmq.exporter.search.rules import with_rules
from vlmq.exporter.search.sensitivity import Item
from vlmq.exporter.walk import Walk

BEGINNING = 4  # bits where answers begin to change; besides them the fewest, where they change much
LEAST = 1e-3  # of a factor: what was measured as nothing, or less for rounding, still costs something


@dataclass(frozen=True)
class Factor:
    """measured: width -> measured divergence over predicted. In between, factors change by equal ratios."""

    measured: Mapping[int, float]

    def at(self, bits: int) -> float:
        widths = sorted(self.measured)
        low = max((width for width in widths if width <= bits), default=widths[0])
        high = min((width for width in widths if width >= bits), default=widths[-1])
        if low >= high:
            return self.measured[low if bits >= low else high]
        share = (bits - low) / (high - low)
        return float(self.measured[low] ** (1 - share) * self.measured[high] ** share)


Factors = Mapping[Component, Factor]


class Measurer:
    """The reference's answers to the samples, and how far those of compositions on the bench are from them."""

    def __init__(self, bench: Bench, asked: Sequence[tuple[Inputs, int]], recipe: Recipe, walk: Walk) -> None:
        self.bench, self.asked, self.recipe, self.walk = bench, asked, recipe, walk
        self.reference = log_probabilities(bench.model, asked)

    def factors(self, items: Sequence[Item], effects: Tensor, progress: Progress) -> dict[Component, Factor]:
        """Of every component that has items. effects: of `fisher.effects` (n, items, choices)."""
        components = list(dict.fromkeys(item.component for item in items))
        found: dict[Component, dict[int, float]] = {component: {} for component in components}
        choices = items[0].choices
        offered = sorted({choice.bits for choice in choices})
        widths = sorted({offered[0], min(offered, key=lambda bits: abs(bits - BEGINNING))})
        done, total = 0, len(components) * len(widths)
        for bits in widths:
            place = next(place for place, choice in enumerate(choices) if choice.bits == bits)
            recipe = with_rules(self.recipe, self.walk, {name: choices[place] for item in items for name in item.sites})
            for piece in self._pieces(recipe):
                if piece.component not in found:
                    continue
                progress("measuring components", done, total)
                its = [number for number, item in enumerate(items) if item.component == piece.component]
                predicted = float(effects[:, its, place].double().sum(1).square().mean()) / 2
                measured = self._divergence([piece])
                found[piece.component][bits] = max(measured / predicted, LEAST) if predicted > 0 else 1.0
                done += 1
        progress("measuring components", total, total)
        return {component: Factor(measured) for component, measured in found.items()}

    def divergence(self, recipe: Recipe) -> float:
        """Of a whole recipe, quantized as an export does it, in nats."""
        return divergence(self.reference, log_probabilities(self.bench.in_sequence(recipe), self.asked))

    def _pieces(self, recipe: Recipe) -> Sequence[Piece]:
        checkpoint = self.bench.checkpoint
        skeleton = checkpoint.skeleton()
        walk = ends.plan(checkpoint, skeleton, recipe)
        return plan(Configuration("allocated", "allocated", recipe.content()), checkpoint, skeleton, walk).pieces

    def _divergence(self, pieces: Sequence[Piece]) -> float:
        for piece in pieces:
            if not (self.bench.folder / piece.key).exists():
                self.bench.make(piece)
        self.bench.compose(pieces)
        return divergence(self.reference, log_probabilities(self.bench.model, self.asked))
