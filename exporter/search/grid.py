"""The grid of a sweep: which configurations are tried, from a YAML file (docs/sweep.md).

Either the product of what each component is given,

    recipe: {method: awq, group_size: 64}       # what all have in common: any keys of a recipe
    together: {method: [awq, gptq]}             # keys that change for all components at once
    each: {bits: [2, 3, 4, 5, 6, 8, 16]}        # keys that change for every component by itself
    components: {connector: {bits: [4, 16]}}    # instead of `each`, for one component
    recipes: {mine: [first.yaml, second.yaml]}  # and recipes, under a name for all of a list

or Algorithm 1 of paper 002, with all non-empty subsets of what is listed:

    uniform: {bits: [2, 4, 6, 8], components: [vision, connector, language],
              blocks: [front, middle, end], kinds: [attention, feedforward]}
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import COMPONENTS, Component
from vlmq.exporter.recipe import make_recipe, read_recipe, thirds_of
from vlmq.exporter.settings import FULL, Bits, Rule, Settings, Third, first_fault
from vlmq.exporter.walk import Walk
from vlmq.exporter.yaml_files import read_yaml

Content = dict[str, Any]
Listed = Annotated[list[Any], Field(min_length=1)]
Varied = dict[str, Listed]
Kinds = Literal["attention", "feedforward"]

KINDS: dict[Kinds, tuple[str, ...]] = {
    "attention": ("attention",),
    # What joins the connector to the language model is no attention: a projector would else be of no kind at all.
    "feedforward": ("feedforward", "projection"),
}


@dataclass(frozen=True)
class Configuration:
    """One row of a sweep. series: what it belongs to, such as a method. recipe: plain values; None: the reference."""

    name: str
    series: str
    recipe: Content | None


class Uniform(BaseModel):
    """Algorithm 1: for every width, every non-empty subset of components, of block groups and of kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Annotated[list[Bits], Field(min_length=1)] = [2, 4, 6, 8]
    components: Annotated[list[Component], Field(min_length=1)] | None = None  # None: those that the model has
    blocks: Annotated[list[Third], Field(min_length=1)] = ["front", "middle", "end"]
    kinds: Annotated[list[Kinds], Field(min_length=1)] = ["attention", "feedforward"]


class Grid(BaseModel):
    """A grid file as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uniform: Uniform | None = None
    recipe: Content = {}
    together: Varied = {}
    each: Varied = {}
    components: dict[Component, Varied] = {}
    recipes: dict[str, Annotated[list[Path], Field(min_length=1)]] = {}


def read_grid(file: Path) -> Grid:
    """VlmqError naming the file and what is wrong in it, such as a component that no model has, or nothing to try."""
    content = read_yaml(file)
    try:
        grid = Grid.model_validate({} if content is None else content)
    except ValidationError as error:
        where, what = _fault(error)
        raise VlmqError(f"{file}: {where}: {what}") from error
    varied = bool(grid.together or grid.each or grid.components)
    if grid.uniform and varied:
        raise VlmqError(f"{file}: uniform and a product in one grid; give each a file of its own")
    if not (grid.uniform or varied or grid.recipes):
        raise VlmqError(f"{file}: an empty grid; give uniform, or each, components or together; see docs/sweep.md")
    paths = {name: [file.parent / path for path in listed] for name, listed in grid.recipes.items()}
    return grid.model_copy(update={"recipes": paths})


def _fault(error: ValidationError) -> tuple[str, str]:
    details = error.errors()[0]
    where = ".".join(str(part) for part in details["loc"] if part != "[key]") or "the file"
    match details["type"]:
        case "literal_error" if "components" in details["loc"]:
            return where, f"no such component; choose {', '.join(COMPONENTS)}"
        case "too_short":
            return where, "an empty list, so nothing would be tried; list values"
        case "extra_forbidden":
            return where, "unknown key; docs/sweep.md lists them"
        case "list_type":
            return where, f"{details['input']!r} is no list; write [...]"
    return where, first_fault(error)[1]


def configurations(grid: Grid, walk: Walk, where: Path) -> list[Configuration]:
    """Every row that the grid names, in its order; VlmqError for what the model or a recipe cannot have.

    walk: of the model.
    """
    present = [component for component in COMPONENTS if any(site.component == component for site in walk.sites)]
    named = [*grid.components, *((grid.uniform and grid.uniform.components) or ())]
    for component in named:
        if component not in present:
            raise VlmqError(f"{where}: the model has no component {component}; it has {', '.join(present)}")
    found = list(_uniform(grid.uniform, walk, present) if grid.uniform else _product(grid, present, where))
    for series, files in grid.recipes.items():
        found += [Configuration(f"{series}: {file.stem}", series, read_recipe(file).content()) for file in files]
    return found


def _product(grid: Grid, present: Sequence[Component], where: Path) -> Iterator[Configuration]:
    """All that the components are given, each with each; nothing where the grid is of recipes alone."""
    if not (grid.together or grid.each or grid.components):
        return
    given = {component: grid.components.get(component, grid.each) for component in present}
    for component, varied in given.items():
        _refuse_unknown(varied, Settings, f"{where}: components.{component}")
    said = grid.recipe.get("components", {})
    for together in _choices(grid.together):
        series = " ".join(str(value) for value in together.values()) or str(grid.recipe.get("method", "awq"))
        for chosen in product(*(_choices(varied) for varied in given.values())):
            parts = {
                component: {**said.get(component, {}), **choice}
                for component, choice in zip(given, chosen, strict=True)
                if choice or component in said
            }
            content = {**grid.recipe, **together, **({"components": parts} if parts else {})}
            name = ", ".join(
                f"{component} {_said(choice)}" for component, choice in zip(given, chosen, strict=True) if choice
            )
            make_recipe(content, f"{where}: {name or series}")
            yield Configuration(f"{series}: {name}" if name else series, series, content)


def _choices(varied: Varied) -> list[Content]:
    return [dict(zip(varied, values, strict=True)) for values in product(*varied.values())]


def _said(choice: Content) -> str:
    if set(choice) == {"bits"}:
        return f"{choice['bits']} bits"
    return " ".join(f"{key}={value}" for key, value in choice.items())


def _refuse_unknown(varied: Varied, kind: type[BaseModel], where: str) -> None:
    for key in varied:
        if key not in kind.model_fields:
            raise VlmqError(f"{where}: unknown key {key!r}; choose {', '.join(kind.model_fields)}")


def _uniform(uniform: Uniform, walk: Walk, present: Sequence[Component]) -> Iterator[Configuration]:
    """Rules that select no linear are left out: two blocks have no front, and a projector no attention."""
    thirds = thirds_of(walk)
    yield Configuration("reference", "uniform", None)
    for bits in uniform.bits:
        for components, blocks, kinds in product(
            _subsets(uniform.components or present), _subsets(uniform.blocks), _subsets(uniform.kinds)
        ):
            rules = [
                {"component": component, "blocks": third, "kind": kind, "bits": bits}
                for component, third, kind in product(
                    components, blocks, [kind for said in kinds for kind in KINDS[said]]
                )
            ]
            live = [rule for rule in rules if _selects(rule, walk, thirds)]
            content = {"method": "uniform", "bits": FULL, "rules": live} if live else None
            if content:
                make_recipe(content, "uniform")
            name = f"{bits} bits: {'+'.join(components)}; {'+'.join(blocks)}; {'+'.join(kinds)}"
            yield Configuration(name, "uniform", content)


def _subsets(values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """All but the empty one, the small ones first."""
    return [found for size in range(1, len(values) + 1) for found in combinations(values, size)]


def _selects(rule: Content, walk: Walk, thirds: dict[str, Third]) -> bool:
    made = Rule.model_validate(rule)
    return any(made.selects(site, thirds[site.name]) for site in walk.sites)
