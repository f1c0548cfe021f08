"""The recipe: which method and which grids each site gets, from command-line flags or a file with one schema.

method: awq
bits: 4
group_size: 128
activations: {bits: 8, group_size: token}
components:
  vision: {bits: 8}
rules:                                  # later rules win; all selectors of a rule must hold
  - {match: 'language_model.*fc2', blocks: end, bits: 8}

docs/recipes.md is the reference. Thirds of blocks are those of paper 002, section 3 ("block groups").
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from vlmq.exporter import consumers, mmq
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import Component
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.scheme import Options, Scheme
from vlmq.exporter.settings import (
    FULL,
    Activations,
    Bits,
    GroupSize,
    MethodName,
    Rule,
    Settings,
    Table,
    Third,
    first_fault,
    laid_over,
)
from vlmq.exporter.walk import Site, Walk
from vlmq.exporter.yaml_files import read_yaml
from vlmq.kernels.grid import ROW, TENSOR, Grid

__all__ = ["Assignment", "Recipe", "Scheme", "make_recipe", "read_recipe", "thirds_of"]

WIDTHS = (256, 128, 64, 32, 16)  # of groups, what `indivisible: shrink` chooses from
UNIFORM = "uniform"  # has one grid only: asymmetric, for the whole tensor (paper 002, A.1)

Qkv = Literal["fused", "split", "v-only", "skip"]


@dataclass(frozen=True)
class Assignment:
    """A scheme for every site that is quantized, and a reason for every linear that is not.

    told: a line for each thing that is left alone for the sake of the consumer.
    """

    schemes: dict[str, Scheme]
    kept: dict[str, str]
    told: tuple[str, ...] = ()


class Recipe(Settings):
    """Defaults, then what each component changes, then what each rule changes."""

    method: MethodName = "awq"
    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = True
    activations: Annotated[Activations, AfterValidator(lambda said: said.spelt_out)] = Activations(bits=FULL)
    options: Options = Options()
    indivisible: Literal["refuse", "shrink"] = "refuse"
    qkv: Qkv = "fused"
    rotate: tuple[Literal["language", "vision"], ...] = ()  # components whose residual stream is rotated
    components: dict[Component, Settings] = Field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    head: Settings | None = None  # the output head; None: left alone
    embedding: Table | None = None  # the token embedding; None: left alone
    consumer: consumers.Name = "any"  # who is to load it: what that one cannot take quantized is left alone

    def content(self) -> dict[str, Any]:
        """Plain values that `make_recipe` reads back to this recipe, in full; null is what is left alone."""
        unsaid = {"group_size", "symmetric"} - self.model_fields_set if self.method == UNIFORM else set()
        said = self.model_dump(mode="json", exclude_none=True, exclude=unsaid)
        said["options"] = self.options.model_dump(mode="json")
        return said | {key: said.get(key) for key in ("head", "embedding")}

    def assign(self, walk: Walk, nothing: bool = False) -> Assignment:
        """Give every site its scheme; VlmqError, before any work, for what matches nothing or cannot be.

        nothing: whether a recipe may leave every linear alone, as one row of a sweep does.
        """
        thirds = thirds_of(walk)
        self._check_selectors(walk, thirds)
        schemes: dict[str, Scheme] = {}
        left = consumers.left_alone(self.consumer, walk)
        self._refuse_in_vain(walk, thirds, left)
        kept = dict(walk.kept)
        for site in walk.sites:
            found = left.get(site.name) or self._scheme(site, thirds[site.name])
            if isinstance(found, str):
                kept[site.name] = found
            else:
                schemes[site.name] = found
        if not schemes and not nothing:
            raise VlmqError(
                "recipe: every linear is left at 16 bits, so nothing would change; give --bits 8 or fewer, or give a "
                "component bits of its own"
            )
        _refuse_two_scales(walk, schemes)
        _refuse_tuning(walk, schemes)
        consumers.refuse(self.consumer, walk, schemes)
        wanted = any(place.activations and place.activations.bits is None for place in self._all_settings())
        if wanted and not any(scheme.inputs for scheme in schemes.values()):
            raise VlmqError("recipe: activations without bits; give --activation-bits 8, 6 or 4")
        return Assignment(schemes, kept, tuple(consumers.told(left, walk.sites)))

    def _check_selectors(self, walk: Walk, thirds: dict[str, Third]) -> None:
        present = {site.component for site in walk.sites}
        for component in (*self.components, *self.rotate):
            if component not in present:
                raise VlmqError(f"recipe: the model has no component {component}; it has {', '.join(sorted(present))}")
        for rule in self.rules:
            if not any(rule.selects(site, thirds[site.name]) for site in walk.sites):
                said = ", ".join(f"{key} {value!r}" for key, value in rule.selectors.items())
                raise VlmqError(f"recipe: the rule {said} matches no linear; `vlmq inspect` lists their names")

    def _refuse_in_vain(self, walk: Walk, thirds: dict[str, Third], left: dict[str, str]) -> None:
        """VlmqError for settings of a component, or a rule, that ask for something of linears all left alone."""
        places: list[tuple[str, Settings, list[str]]] = [
            (f"components.{component}", said, [site.name for site in walk.sites if site.component == component])
            for component, said in self.components.items()
        ]
        for index, rule in enumerate(self.rules):
            selected = [site.name for site in walk.sites if rule.selects(site, thirds[site.name])]
            places.append((f"rules.{index}", rule, selected))
        for place, said, names in places:
            asks = said.bits != FULL and any(getattr(said, key) is not None for key in Settings.model_fields)
            if asks and all(name in left for name in names):
                raise VlmqError(
                    f"recipe: {place}: of what it says nothing would be done: {left[names[0]]}; leave it out, or "
                    f"choose another --consumer than {self.consumer}"
                )

    def _scheme(self, site: Site, third: Third) -> Scheme | str:
        """The site's scheme, or the reason it is kept in full precision."""
        if site.kind == "embedding":
            return self._table_scheme(site)
        method, bits, group, symmetric = self.method, self.bits, self.group_size, self.symmetric
        activations, options = self.activations, self.options
        for place, settings in self._settings(site, third):
            method = settings.method or method
            bits = settings.bits or bits
            group = group if settings.group_size is None else settings.group_size
            symmetric = symmetric if settings.symmetric is None else settings.symmetric
            activations = laid_over(activations, settings.activations)
            options = laid_over(options, settings.options)
            if method == UNIFORM:
                _refuse_other_grid(place, settings)
        if bits == FULL:
            return "16 bits asked for"
        if site.parts and self.qkv == "skip":
            return "fused projection, --qkv skip"
        grid = Grid(bits, TENSOR, symmetric=False) if method == UNIFORM else Grid(bits, group, symmetric)
        inputs = activations.grid
        scheme = Scheme(
            method,
            self._fitting(grid, site, "--group-size"),
            inputs and self._fitting(inputs, site, "--activation-group", "token"),
            self._rows(site),
            options,
        )
        _refuse_senseless(scheme, site, self.qkv)
        return scheme

    def _table_scheme(self, site: Site) -> Scheme:
        assert self.embedding is not None  # or it would be no site
        said = self.embedding
        group = self.group_size if said.group_size is None else said.group_size
        symmetric = self.symmetric if said.symmetric is None else said.symmetric
        return Scheme("rtn", self._fitting(Grid(said.bits or self.bits, group, symmetric), site, "group_size"))

    def _all_settings(self) -> tuple[Settings, ...]:
        return (self, *self.components.values(), *self.rules, *([self.head] if self.head else []))

    def _settings(self, site: Site, third: Third) -> Iterator[tuple[str, Settings]]:
        """The places that say something about a site, the later the stronger."""
        yield "recipe", self
        if site.kind == "head" and self.head:
            yield "recipe: head", self.head
            return
        if site.component in self.components:
            yield f"recipe: components.{site.component}", self.components[site.component]
        for index, rule in enumerate(self.rules):
            if rule.selects(site, third):
                yield f"recipe: rules.{index}", rule

    def _fitting(self, grid: Grid, site: Site, flag: str, row: str = "row") -> Grid:
        """The grid, or (`indivisible: shrink`) one with the widest group that divides the site's columns."""
        if grid.group in (ROW, TENSOR) or site.columns % grid.group == 0:
            return grid
        widths = [width for width in WIDTHS if site.columns % width == 0]
        if self.indivisible == "refuse":
            choice = " or ".join(filter(None, [", ".join(map(str, reversed(widths))), row]))
            raise VlmqError(
                f"{site.name}: {site.columns} columns do not divide into groups of {grid.group}; "
                f"choose {flag} {choice}, or --indivisible shrink"
            )
        return Grid(grid.bits, next((width for width in widths if width < grid.group), ROW), grid.symmetric)

    def _rows(self, site: Site) -> tuple[slice, ...] | None:
        if not site.parts or self.qkv == "fused":
            return None
        parts = ("v",) if self.qkv == "v-only" else site.parts
        return tuple(site.part_rows(part) for part in parts)


def thirds_of(walk: Walk) -> dict[str, Third]:
    """In which third of its stage's blocks each site is."""
    return {
        site.name: _third(block.index, len(stage)) for stage in walk.stages for block in stage for site in block.sites
    }


def _third(index: int, count: int) -> Third:
    """[0, n/3) [n/3, 2n/3) [2n/3, n), rounded down: of two blocks there is no front, and a lone one is the end."""
    return "front" if index < count // 3 else "middle" if index < 2 * count // 3 else "end"


def _refuse_other_grid(place: str, settings: Settings) -> None:
    said = settings.model_fields_set
    if ("group_size" in said and settings.group_size not in (None, TENSOR)) or (
        "symmetric" in said and settings.symmetric
    ):
        raise VlmqError(
            f"{place}: uniform has one grid, asymmetric and for the whole tensor; leave out group_size and symmetric, "
            "or choose --method rtn"
        )


def _refuse_senseless(scheme: Scheme, site: Site, qkv: Qkv) -> None:
    if METHODS[scheme.method].for_inputs and scheme.inputs is None:
        raise VlmqError(f"{site.name}: {scheme.method} prepares inputs for quantization; give --activation-bits 8")
    if site.kind == "head" and METHODS[scheme.method].percentiles:
        raise VlmqError(
            f"{site.name}: {scheme.method} looks at what a block puts out, and nothing reads the head; "
            "give head another method"
        )
    options = scheme.options
    if scheme.method.endswith("gptq") and options.act_order and not options.static_groups and scheme.grid.group > 0:
        raise VlmqError(
            f"{site.name}: act_order without static_groups needs g_idx, which no reader takes; set static_groups: true"
        )
    if site.parts and qkv == "v-only" and scheme.inputs:
        raise VlmqError(
            f"{site.name}: --qkv v-only stores it dense, and the input of a dense linear is not rounded; "
            "choose --qkv fused, split or skip"
        )


def _refuse_two_scales(walk: Walk, schemes: dict[str, Scheme]) -> None:
    """Linears that read one input share the scale that is folded before it, so one method must choose it."""
    for entry in (entry for block in walk.blocks for entry in block.inputs if entry.source):
        asking = {METHODS[schemes[site.name].method].rescale: site.name for site in entry.sites if site.name in schemes}
        asking.pop(None, None)
        if len(asking) > 1:
            first, second = list(asking.values())[:2]
            raise VlmqError(
                f"{second}: {schemes[second].method} would rescale the input it shares with {first}, which "
                f"{schemes[first].method} rescales; give both one method"
            )


def _refuse_tuning(walk: Walk, schemes: dict[str, Scheme]) -> None:
    """The loss by which qvlm tunes a vision encoder follows one stream from the image to the answer."""
    if not any(block.answers for block in walk.blocks):
        return
    for site in walk.sites:
        scheme = schemes.get(site.name)
        if (
            site.component == "vision"
            and scheme
            and METHODS[scheme.method].percentiles
            and scheme.options.vision_tuning
        ):
            raise VlmqError(
                f"{site.name}: {scheme.method} cannot tune the vision encoder before an encoder-decoder; "
                "set --option vision_tuning=false"
            )


def read_recipe(file: Path) -> Recipe:
    """A recipe from a YAML or JSON file, ours or in a layout of mmq; VlmqError naming the file and the wrong key."""
    content = read_yaml(file)
    if file.suffix.lower() == ".json" and mmq.is_layout(content):
        content = mmq.recipe(content, str(file))
    return make_recipe({} if content is None else content, str(file))


def make_recipe(content: dict[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values, checked; VlmqError with the first thing that is wrong."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        place, what = first_fault(error)
        raise VlmqError(f"{where}: {f'{place}: ' if place else ''}{what}") from error
