"""The source as an export should have it, and what its recipe says of it; and what it is called where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmq.exporter import ends
from vlmq.exporter.checkpoint import Checkpoint, open_checkpoint
from vlmq.exporter.recipe import Assignment, make_recipe
from vlmq.exporter.rotation import rotate
from vlmq.exporter.walk import Walk
from vlmq.formats import manifest
from vlmq.formats.manifest import Manifest, TensorRecord
from vlmq.formats.shards import headers


@dataclass(frozen=True)
class Fault:
    """Something that is not as it must be; `check` is the name that a person sees first."""

    check: str  # files, recipe, companions, hashes, tensors, folds
    what: str

    def __str__(self) -> str:
        return f"{self.check}: {self.what}"


@dataclass(frozen=True)
class Expected:
    """The source as the export should have it, and what its recipe says."""

    made: Manifest
    source: Checkpoint  # rotated, where the recipe rotates
    walk: Walk
    assignment: Assignment
    aliases: dict[str, str]

    def disk(self, module: str) -> str:
        """A linear's name on disk; a tied head has none of its own."""
        place = self.source.places.get(f"{module}.weight")
        return place.name.removesuffix(".weight") if place else module

    def record(self, module: str) -> TensorRecord | None:
        return self.made.tensors.get(self.disk(module))

    def components(self, disk: bool) -> dict[str, str]:
        """The component of every module that has tensors, and of the tensors that have no module."""
        found = {}
        for name, place in self.source.places.items():
            said = place.name if disk else name
            found[said.rpartition(".")[0] or said] = component_of(name)
        return found

    def source_sizes(self) -> dict[str, int]:
        """The bytes of the source's tensors by component."""
        of = {place.name: component_of(name) for name, place in self.source.places.items()}
        sizes: dict[str, int] = {}
        for name, header in headers(self.source.folder).items():
            if name in of:
                sizes[of[name]] = sizes.get(of[name], 0) + header.bytes
        return sizes


def expected_of(folder: Path, reference: Path) -> Expected:
    """What the checkpoint in `reference` should have become in `folder`; VlmqError or FormatError where one is none."""
    made = manifest.read(folder)
    recipe = make_recipe(made.recipe, str(folder / manifest.NAME))
    source = rotate(open_checkpoint(str(reference)), recipe.rotate)
    model = source.skeleton()
    walk = ends.plan(source, model, recipe)
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    return Expected(made, source, walk, recipe.assign(walk), tied | {two: one for one, two in tied.items()})


def component_of(name: str) -> str:
    """The component that a tensor in memory belongs to, in any family: by the module it is in."""
    for component, words in ROOTS.items():
        if any(word in name for word in words):
            return component
    return "language"


ROOTS: Mapping[str, Sequence[str]] = {
    "vision": ("vision_model.", "vision_tower."),
    "connector": ("qformer.", "language_projection.", "query_tokens", "multi_modal_projector."),
}
