"""What configurations have in common: the canonical form of what one does to a model, component by component.

A *piece* is one component quantized one way. Two configurations whose canonical forms are equal quantize the same
tensors the same way, whatever their recipes look like, and are measured once.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmq.exporter import ends
from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.families import COMPONENTS, Component
from vlmq.exporter.inspection import inspection
from vlmq.exporter.methods.registry import METHODS, is_calibrated
from vlmq.exporter.recipe import Assignment, make_recipe
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.search.grid import Configuration, Content
from vlmq.exporter.settings import FULL
from vlmq.exporter.walk import Site, Walk
from vlmq.kernels.grid import TENSOR

DIGITS = 16  # of a digest: 64 bits


@dataclass(frozen=True)
class Piece:
    """One component as one recipe has it; `key` is the digest of its canonical form."""

    key: str
    component: Component
    recipe: Content


@dataclass(frozen=True)
class Planned:
    """A configuration against a model: `pieces` of the components that it changes, and what follows from its recipe.

    key: equal for configurations that quantize the same tensors the same way. bits: of each component, the mean over
    the weights of its blocks' linears. bytes: of all of the model's weights, scales and zeros included. calibrated:
    whether it looks at samples.
    """

    configuration: Configuration
    key: str
    pieces: tuple[Piece, ...]
    bits: dict[Component, float]
    bytes: int
    calibrated: bool


def plan(configuration: Configuration, checkpoint: Checkpoint, skeleton: nn.Module, walk: Walk) -> Planned:
    """VlmqError where the recipe cannot be meant for the model. walk: of the model as it is, for the reference."""
    assignment = Assignment({}, dict.fromkeys((site.name for site in walk.sites), "the reference"))
    pieces: list[Piece] = []
    if configuration.recipe is not None:
        recipe = make_recipe(configuration.recipe, configuration.name)
        walk = ends.plan(checkpoint, skeleton, recipe)
        assignment = recipe.assign(walk, nothing=True)
        for component, form in canonical(assignment, walk).items():
            pieces.append(Piece(_digest([recipe.rotate, form]), component, configuration.recipe))
    bits = {component: mean_bits(component, walk, assignment) for component in COMPONENTS}
    return Planned(
        configuration,
        _digest([piece.key for piece in pieces]),
        tuple(pieces),
        {component: mean for component, mean in bits.items() if mean is not None},
        inspection(checkpoint, skeleton, walk, assignment).after,
        any(is_calibrated(scheme) for scheme in assignment.schemes.values()),
    )


def canonical(assignment: Assignment, walk: Walk) -> dict[Component, list[Any]]:
    """Of each component that is changed: every quantized site and how, as JSON, whichever way a recipe said it."""
    forms: dict[Component, list[Any]] = {}
    for site in walk.sites:
        if site.name in assignment.schemes:
            forms.setdefault(site.component, []).append([site.name, _form(assignment.schemes[site.name], site)])
    return forms


def alone(assignment: Assignment, walk: Walk, component: Component) -> Assignment:
    """The assignment with every other component left in full precision."""
    mine = {site.name for site in walk.sites if site.component == component}
    return Assignment(
        {name: scheme for name, scheme in assignment.schemes.items() if name in mine},
        assignment.kept | dict.fromkeys(assignment.schemes.keys() - mine, "another piece's"),
    )


def _form(scheme: Scheme, site: Site) -> list[Any]:
    """What the codes of a site depend on.

    `uniform` is rtn by another name. Options are read by calibrated methods, but for `biases`. Stacked parts that
    are all quantized, each row or group on a grid of its own, equal the whole bit for bit (DESIGN.md, promise 3).
    """
    method = METHODS[scheme.method]
    names = [name for name, other in METHODS.items() if other == method]
    options = scheme.options.model_dump(mode="json")
    if not method.calibrated:
        options = {"biases": options["biases"]}
    rows = [[part.start, part.stop] for part in scheme.rows or ()]
    if scheme.grid.group != TENSOR and sum(stop - start for start, stop in rows) == site.rows:
        rows = []
    grids = [grid and [grid.bits, grid.group, grid.symmetric] for grid in (scheme.grid, scheme.inputs)]
    return [names[0], *grids, rows, options]


def mean_bits(component: Component, walk: Walk, assignment: Assignment) -> float | None:
    """Of the weights of a component's blocks, full precision as 16; None where it has none."""
    sites = [site for site in walk.sites if site.component == component and site.kind not in ("embedding", "head")]
    weights = sum(site.rows * site.columns for site in sites)
    if not weights:
        return None
    schemes = assignment.schemes
    total = sum(
        site.rows * site.columns * (schemes[site.name].grid.bits if site.name in schemes else FULL) for site in sites
    )
    return total / weights


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGITS]
