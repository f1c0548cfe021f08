"""Bits where they matter: the recipe of a budget that is expected to change a model's answers least.

samples -> what every choice changes -> what that does to answers -> measured factors -> best choices -> recipe
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from vlmq.exporter import data as datas
from vlmq.exporter import ends
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.devices import device_of
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import COMPONENTS, Component
from vlmq.exporter.inspection import inspection, stored_dtype
from vlmq.exporter.progress import Progress, silent
from vlmq.exporter.recipe import Assignment, Recipe
from vlmq.exporter.rotation import rotate
from vlmq.exporter.runtime import open_processor
from vlmq.exporter.samples import COUNT
from vlmq.exporter.search import budget, quadratic
from vlmq.exporter.search.bench import Bench
from vlmq.exporter.search.fisher import answered, effects, together
from vlmq.exporter.search.pieces import mean_bits
from vlmq.exporter.search.refine import Factors, Measurer
from vlmq.exporter.search.rules import with_rules
from vlmq.exporter.search.sensitivity import Choice, Item, is_chosen_for, items, site_bytes
from vlmq.exporter.search.tasks import fitting
from vlmq.exporter.settings import FULL
from vlmq.exporter.walk import Walk
from vlmq.kernels.grid import BITS

Formats = Literal["safetensors", "onnx", "both"]
ASKED = 512  # samples drawn: rare answers that change count for most of the divergence, and few samples have none
TOGETHER = 16  # of them at once, where the weights are few: what is in between is then little too
FEW = 2**25  # weights
COMMON = 0.5  # of what effects of two inputs share, what is left where each is solved on what the quantized put out
IN_GRAPHS = (2, 4, 8)  # bits whose container in an ONNX graph is no wider than they are


@dataclass(frozen=True)
class Request:
    """recipe: method, grids, and what is to stay at 16 bits; its other bits are chosen anew. groups: to choose from
    too; none: as the recipe has them. formats: that are to hold the result. samples: to calibrate on; asked: that are
    drawn, those among them, of which the task's are asked."""

    model: str
    budget: str
    recipe: Recipe = field(default_factory=Recipe)
    task: str = "vqa"
    groups: tuple[int, ...] = ()
    formats: Formats = "safetensors"
    revision: str | None = None
    calibration: str | None = None
    samples: int = COUNT
    asked: int = ASKED
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class Allocated:
    """The recipe and what is expected of it.

    bytes: of all weights; linears: of those that bits were chosen for and of the blocks' others, scales and zeros
    included; bits_per_weight: of these. predicted, measured: divergence from the reference in nats, on the samples
    asked. factors: by component, of each width measured, how much of its prediction came true.
    """

    recipe: Recipe
    bytes: int
    linears: int
    bits_per_weight: float
    bits: dict[Component, float]
    predicted: float
    measured: float
    factors: dict[Component, dict[int, float]]


def allocate(request: Request, progress: Progress = silent) -> Allocated:
    """VlmqError for a budget that is none, below what is possible, or above what the model has."""
    return allocations(request, [request.budget], progress)[0]


def allocations(
    request: Request, budgets: Sequence[str], progress: Progress = lambda what, done, of: None
) -> list[Allocated]:
    """One for each budget, in place of the request's; what choices cost is found once for all."""
    device = device_of(request.device)
    checkpoint = rotate(open_checkpoint(request.model, request.revision), request.recipe.rotate)
    skeleton = checkpoint.skeleton()
    walk = ends.plan(checkpoint, skeleton, request.recipe)
    base = request.recipe.assign(walk)
    if request.recipe.qkv == "v-only":
        raise VlmqError("recipe: --qkv v-only stores fused projections dense, so bits save nothing; choose another")
    if not is_chosen_for(walk, base):
        raise VlmqError("recipe: every linear of a block is left at 16 bits, so there are no bits to choose")
    assignments = _assignments(request, walk, base)
    sites = [site for site in walk.sites if site.kind not in ("embedding", "head")]
    width = stored_dtype(checkpoint).itemsize
    weights = sum(site.rows * site.columns for site in sites)
    whole = inspection(checkpoint, skeleton, walk, base)
    elsewhere = whole.after - sum(site_bytes(site, base.schemes.get(site.name), width) for site in sites)
    pinned = sum(site_bytes(site, None, width) for site in sites if site.name not in base.schemes)
    allowed = [budget.in_bytes(text, whole.before, weights, elsewhere) - pinned for text in budgets]
    drawn = max(request.samples, request.asked)
    data = datas.choose(checkpoint, request.calibration, None, drawn, request.seed, verify=False)
    assert data.calibration is not None
    samples = data.calibration.samples[: request.samples]  # a smaller draw is the beginning of a larger one
    fit = fitting(request.task, data.calibration.samples)
    few = sum(parameter.numel() for parameter in skeleton.parameters()) <= FEW
    asked = together(answered(fit, open_processor(checkpoint.folder), checkpoint), TOGETHER if few else 1)
    with TemporaryDirectory(prefix="vlmq-allocate-") as pieces, TemporaryDirectory(prefix="vlmq-choices-") as changes:
        bench = Bench(request.model, request.revision, request.recipe.rotate, samples, Path(pieces), device)
        found = items(checkpoint, bench.model, walk, assignments, bench.batches, Path(changes), progress)
        for text, most in zip(budgets, allowed, strict=True):
            _refuse_too_little(text, found, most, pinned, elsewhere, weights)
            if sum(item.bytes[Choice(FULL)] for item in found) <= most:
                raise VlmqError(f"--budget {text}: has room for every linear at 16 bits; give less")
        told = effects(bench.model, found, asked, request.seed, progress=progress)
        measurer = Measurer(bench, asked, request.recipe, walk)
        factors = measurer.factors(found, told, progress)
        choices = [*found[0].choices, Choice(FULL)]
        sizes = np.array([[item.bytes[choice] for choice in choices] for item in found])
        plain = told.double().numpy()
        exact = [quadratic.products(each) for each in (_refined(plain, found, factors), _whole(plain))]
        costs = [quadratic.loosened(each, COMMON) for each in exact]
        made = []
        for most in allowed:
            candidates = _candidates(costs, sizes, most, [choice.bits for choice in choices])
            chosen = [_by_site(found, [choices[place] for place in places]) for places in candidates]
            recipes = [with_rules(request.recipe, walk, each) for each in chosen]
            measured = _measured(recipes, measurer, progress)
            best = int(np.argmin(measured))
            places, recipe = candidates[best], recipes[best]
            final = recipe.assign(ends.plan(checkpoint, skeleton, recipe))
            _check(final, assignments, chosen[best])
            linears = _total(sizes, places) + pinned
            made.append(
                Allocated(
                    recipe=recipe,
                    bytes=linears + elsewhere,
                    linears=linears,
                    bits_per_weight=8 * linears / weights,
                    bits=_mean_bits(walk, final),
                    predicted=quadratic.cost(costs[0], places),
                    measured=measured[best],
                    factors={component: dict(factor.measured) for component, factor in factors.items()},
                )
            )
    return made


def _measured(recipes: Sequence[Recipe], measurer: Measurer, progress: Progress) -> list[float]:
    """The divergence of each, in nats."""
    found = []
    for done, recipe in enumerate(recipes):
        progress("measuring candidates", done, len(recipes))
        found.append(measurer.divergence(recipe))
    progress("measuring candidates", len(recipes), len(recipes))
    return found


def in_words(found: Allocated) -> tuple[str, ...]:
    """What a person is told of it, a line for each thing."""
    bits = ", ".join(f"{component} {mean:.2f}" for component, mean in found.bits.items())
    factors = ", ".join(
        f"{component} {'/'.join(f'{factor:.2g}' for factor in measured.values())}"
        for component, measured in found.factors.items()
    )
    return (
        f"{found.bytes:,} bytes of weights, {found.linears:,} of them the blocks' linears: "
        f"{found.bits_per_weight:.3f} bits per weight, scales and zeros counted",
        f"mean bits: {bits}",
        f"expected divergence of the answers {found.predicted:.4g} nats, measured on the samples asked "
        f"{found.measured:.4g}; measured over predicted, component by component: {factors}",
    )


def _choices(request: Request) -> list[Choice]:
    bits = BITS if request.formats == "safetensors" else IN_GRAPHS
    return [Choice(width, group) for width in bits for group in (request.groups or (None,))]


def _assignments(request: Request, walk: Walk, base: Assignment) -> dict[Choice, Assignment]:
    """Every choice that the recipe's consumer can load; VlmqError where it can load none."""
    found: dict[Choice, Assignment] = {}
    refused: VlmqError | None = None
    for choice in _choices(request):
        try:
            found[choice] = _at(choice, request.recipe, walk, base)
        except VlmqError as error:
            if request.recipe.consumer == "any":
                raise
            refused = error
    if refused and not found:
        raise refused
    return found


def _at(choice: Choice, recipe: Recipe, walk: Walk, base: Assignment) -> Assignment:
    """Every linear that is quantized at all, with one choice for all of them."""
    free = {site.name: choice for site in walk.sites if site.name in base.schemes}
    return with_rules(recipe, walk, free).assign(walk)


def _refined(found: np.ndarray, its: Sequence[Item], factors: Factors) -> np.ndarray:
    """Effects (n, items, choices) times the root of what came true of their squares; with full precision's, none."""
    factor = np.array([[factors[item.component].at(choice.bits) for choice in item.choices] for item in its])
    return _whole(found * np.sqrt(factor))


def _whole(found: np.ndarray) -> np.ndarray:
    """Effects with those of full precision."""
    return np.pad(found, ((0, 0), (0, 0), (0, 1)))


def _candidates(
    costs: Sequence[np.ndarray], sizes: np.ndarray, most: int, bits: Sequence[int]
) -> list[tuple[int, ...]]:
    """Choices worth measuring, each once: the best by every prediction, and the same for all as far as it goes; also
    the best that are a width away from that one at most, where predictions err less. bits: of each choice."""
    found = [quadratic.solve(cost, sizes, most) for cost in costs]
    uniform = [(place,) * len(sizes) for place in range(sizes.shape[1])]
    fitting = [places for places in uniform if _total(sizes, places) <= most]
    if fitting:
        same = max(fitting, key=lambda places: _total(sizes, places))
        widths = sorted(set(bits))
        middle = widths.index(bits[same[0]])
        near = [place for place, width in enumerate(bits) if abs(widths.index(width) - middle) <= 1]
        chosen = quadratic.solve(costs[-1][:, near][..., near], sizes[:, near], most)
        found += [tuple(near[place] for place in chosen), same]
    return list(dict.fromkeys(found))


def _total(sizes: np.ndarray, places: Sequence[int]) -> int:
    return int(sizes[np.arange(len(sizes)), list(places)].sum())


def _by_site(found: Sequence[Item], choices: Sequence[Choice]) -> dict[str, Choice]:
    return {name: choice for item, choice in zip(found, choices, strict=True) for name in item.sites}


def _refuse_too_little(
    text: str, found: Sequence[Item], allowed: int, pinned: int, elsewhere: int, weights: int
) -> None:
    least = sum(min(item.bytes.values()) for item in found)
    if least > allowed:
        linears = least + pinned
        raise VlmqError(
            f"--budget {text}: below what is possible; with the fewest bits the linears have "
            f"{8 * linears / weights:.3f} bits per weight, and all weights {linears + elsewhere:,} bytes; "
            "give at least that"
        )


def _check(final: Assignment, assignments: Mapping[Choice, Assignment], chosen: Mapping[str, Choice]) -> None:
    """The rules say what was chosen, linear by linear."""
    for name, choice in chosen.items():
        expected = None if choice.bits == FULL else assignments[choice].schemes[name]
        if final.schemes.get(name) != expected:
            raise RuntimeError(f"{name}: the rules do not say what was chosen")


def _mean_bits(walk: Walk, assignment: Assignment) -> dict[Component, float]:
    found = {component: mean_bits(component, walk, assignment) for component in COMPONENTS}
    return {component: bits for component, bits in found.items() if bits is not None}
