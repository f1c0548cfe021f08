"""One model on the bench: pieces of it are quantized, put together, taken apart again, and what results is scored.

A piece is one component, calibrated with the others in full precision, so that pieces do not depend on each other
and any of them can be composed. Nothing of one component's error is known to the next: that is what differs from an
export, where each component is calibrated on what the quantized ones before it put out (docs/sweep.md).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.exporter import ends
from vlmq.exporter.calibration import Calibration, Inputs, Played, prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.devices import CPU
from vlmq.exporter.evaluation.tasks import task as evaluation
from vlmq.exporter.families import COMPONENTS, Component
from vlmq.exporter.journal import read_block, write_block
from vlmq.exporter.methods.registry import is_calibrated
from vlmq.exporter.quantize import needs_reference, quantize
from vlmq.exporter.recipe import Assignment, Recipe, make_recipe
from vlmq.exporter.rotation import rotate
from vlmq.exporter.rounding import InputRounding
from vlmq.exporter.runtime import open_processor
from vlmq.exporter.samples import Sample
from vlmq.exporter.search.kept import Kept, tensor_bytes
from vlmq.exporter.search.pieces import Piece, alone
from vlmq.exporter.search.tasks import Asked, ask, score
from vlmq.exporter.simulate import simulate_batches
from vlmq.exporter.solving import QuantizedBlock, dense
from vlmq.exporter.walk import Walk
from vlmq.formats.folder import staged
from vlmq.kernels.grid import Grid, Limits


@dataclass(frozen=True)
class Dense:
    """A piece as a model computes with it: parameters by name, and the grids and limits of inputs that are rounded."""

    parameters: dict[str, Tensor]
    grids: dict[str, Grid]
    limits: dict[str, Limits | None]


NOTHING = Dense({}, {}, {})


class Bench:
    """A checkpoint, the samples that its pieces are calibrated on, and the folder where they are kept."""

    def __init__(
        self,
        model: str,
        revision: str | None,
        rotated: Sequence[str],
        calibration: Sequence[Sample],
        folder: Path,
        device: torch.device = CPU,
    ) -> None:
        """device: where the model is, and pieces are quantized."""
        self.checkpoint = rotate(open_checkpoint(model, revision), tuple(rotated))
        self.folder, self.device = folder, device
        self.model = self.checkpoint.model().to(device)
        self._as_stored(self.checkpoint.transforms)
        self.batches: list[Inputs] = prepare(
            calibration, open_processor(self.checkpoint.folder), self.checkpoint.family
        )
        self._played: dict[Component, tuple[Played, Played]] = {}
        self._on: dict[Component, str] = {}  # the piece that a component is
        self._changed: dict[Component, set[str]] = {}  # the parameters that it changed
        self._dense: Kept[Dense] = Kept(lambda dense: tensor_bytes(dense.parameters))
        self._roundings: dict[Component, InputRounding] = {}

    def ask(self, task: str, samples: Sequence[evaluation.Asked]) -> Asked:
        """The samples of a task, prepared; to be called before anything is put together."""
        return ask(task, self.checkpoint, self.model, samples)

    def score(self, pieces: Sequence[Piece], asked: Asked) -> dict[str, float]:
        self.compose(pieces)
        return score(self.model, asked)

    def score_in_sequence(self, recipe: dict, asked: Asked) -> dict[str, float]:
        return score(self.in_sequence(make_recipe(recipe)), asked)

    def in_sequence(self, recipe: Recipe) -> PreTrainedModel:
        """A model quantized as an export does it, each component on what the quantized ones before it put out."""
        return simulate_batches(self.checkpoint, recipe, self.batches, self.device)[0]

    @torch.no_grad()
    def make(self, piece: Piece) -> None:
        """Quantize a component and keep it, whole or not at all: one file for each of its blocks that changes."""
        with staged(self.folder / piece.key) as stage:
            for index, block in enumerate(self._quantized(piece)):
                if block.sites:
                    write_block(block, stage / f"{index:05}.safetensors")

    def _quantized(self, piece: Piece) -> list[QuantizedBlock]:
        skeleton = self.checkpoint.skeleton()
        walk, assignment = self._plan(piece)
        calibration = None
        if any(is_calibrated(scheme) for scheme in assignment.schemes.values()):
            calibration = Calibration(skeleton, self.batches, needs_reference(assignment))
            played, reference = self._before(piece.component, walk)
            calibration.played, calibration.reference_played = list(played), list(reference)
        only = _only(walk, [piece.component])
        return list(quantize(self.checkpoint, skeleton, only, assignment, calibration, device=self.device))

    def _plan(self, piece: Piece) -> tuple[Walk, Assignment]:
        recipe = make_recipe(piece.recipe)
        walk = ends.plan(self.checkpoint, self.checkpoint.skeleton(), recipe)
        return walk, alone(recipe.assign(walk), walk, piece.component)

    def _before(self, component: Component, walk: Walk) -> tuple[Played, Played]:
        """What the full-precision components before this one put out, found once."""
        if component not in self._played:
            before = COMPONENTS[: COMPONENTS.index(component)]
            skeleton = self.checkpoint.skeleton()
            calibration = Calibration(skeleton, self.batches)
            only = _only(walk, before)
            list(quantize(self.checkpoint, skeleton, only, Assignment({}, {}), calibration, device=self.device))
            # In full precision, what the reference put out is what came out.
            self._played[component] = (calibration.played, calibration.played)
        return self._played[component]

    @torch.no_grad()
    def compose(self, pieces: Sequence[Piece]) -> None:
        """Make the model what the pieces make it; what stays as it was is not touched."""
        wanted = {piece.component: piece for piece in pieces}
        for component in COMPONENTS:
            piece = wanted.get(component)
            if self._on.get(component) == (piece and piece.key):
                continue
            form = self._read(piece) if piece else NOTHING
            changed = self._changed.pop(component, set())
            self._as_stored(changed - form.parameters.keys())
            if component in self._roundings:
                self._roundings.pop(component).remove()
            self._on.pop(component, None)
            if piece:
                self._changed[component] = set(form.parameters)
                for name, tensor in form.parameters.items():
                    self.model.get_parameter(name).copy_(tensor)
                if form.grids:
                    self._roundings[component] = InputRounding(self.model, form.grids, form.limits)
                self._on[component] = piece.key

    def _read(self, piece: Piece) -> Dense:
        return self._dense.get(piece.key, lambda: self._read_anew(piece))

    def _read_anew(self, piece: Piece) -> Dense:
        walk, assignment = self._plan(piece)
        found = Dense({}, {}, {})
        for index, block in enumerate(_only(walk, [piece.component]).blocks):
            if not any(site.name in assignment.schemes for site in block.sites):
                continue
            read = read_block(self.folder / piece.key / f"{index:05}.safetensors", block, assignment.schemes)
            found.parameters.update({f"{name}.weight": dense(site.weight) for name, site in read.sites.items()})
            found.parameters.update(read.changed)
            for name, site in read.sites.items():
                if site.scheme.inputs:
                    found.grids[name] = site.scheme.inputs
                    found.limits[name] = site.limits
        return found

    @torch.no_grad()
    def _as_stored(self, names: Iterable[str]) -> None:
        """As precise as a file holds them, and no more."""
        for name in names:
            self.model.get_parameter(name).copy_(self.checkpoint.read(name))


def _only(walk: Walk, components: Sequence[Component]) -> Walk:
    """The stages of some components; the others are kept, so that nothing reads their weights."""
    stages = tuple(stage for stage in walk.stages if stage[0].component in components)
    others = [block.name for block in walk.blocks if block.component not in components]
    return Walk(stages, walk.kept | dict.fromkeys(others, "another piece's"))
