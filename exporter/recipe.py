"""The recipe: which method and grid each site gets, from command-line flags or a YAML file with one schema.

method: awq
bits: 4
group_size: 128
components:
  vision: {bits: 8}
rules:                                  # later rules win; a regular expression on the in-memory name
  - {match: 'language_model.*fc2', bits: 8}
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import Component
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.walk import Site, Walk
from vlmq.kernels.grid import BITS, Grid

FULL = 16  # bits that mean "left alone"

Qkv = Literal["fused", "split", "v-only", "skip"]


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    return name


def _known_bits(bits: int) -> int:
    if bits not in (*BITS, FULL):
        raise ValueError(f"{bits} bits; choose one of {', '.join(map(str, BITS))}, or {FULL} to leave alone")
    return bits


def _known_group(group: int) -> int:
    Grid(bits=4, group=group)
    return group


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from error
    return text


MethodName = Annotated[str, AfterValidator(_known_method)]
Bits = Annotated[int, AfterValidator(_known_bits)]
GroupSize = Annotated[int, AfterValidator(_known_group)]


class Settings(BaseModel):
    """What a component or a rule changes; None leaves it as it was."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: MethodName | None = None
    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None


class Rule(Settings):
    """Settings for the sites whose in-memory name the regular expression finds."""

    match: Annotated[str, AfterValidator(_pattern)]


@dataclass(frozen=True)
class Scheme:
    """What one site gets: a method and a weight grid, and the rows it applies to (None: all)."""

    method: str
    grid: Grid
    rows: tuple[slice, ...] | None = None  # solved one by one; None: the whole linear at once


@dataclass(frozen=True)
class Assignment:
    """A scheme for every site that is quantized, and a reason for every linear that is not."""

    schemes: dict[str, Scheme]
    kept: dict[str, str]


class Recipe(BaseModel):
    """Defaults, then what each component changes, then what each rule changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: MethodName = "awq"
    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = True
    qkv: Qkv = "fused"
    components: dict[Component, Settings] = {}
    rules: tuple[Rule, ...] = ()

    def assign(self, walk: Walk) -> Assignment:
        """Give every site its scheme; VlmqError for a rule that matches nothing or a group that does not divide."""
        present = {site.component for site in walk.sites}
        for component in self.components:
            if component not in present:
                raise VlmqError(f"recipe: the model has no component {component}; it has {', '.join(sorted(present))}")
        for rule in self.rules:
            if not any(re.search(rule.match, site.name) for site in walk.sites):
                raise VlmqError(f"recipe: the rule {rule.match!r} matches no linear; `vlmq inspect` lists their names")
        schemes: dict[str, Scheme] = {}
        kept = dict(walk.kept)
        for site in walk.sites:
            found = self._scheme(site)
            if isinstance(found, str):
                kept[site.name] = found
            else:
                schemes[site.name] = found
        if not schemes:
            raise VlmqError("recipe: every linear is left at 16 bits; give at least one component fewer")
        return Assignment(schemes, kept)

    def _scheme(self, site: Site) -> Scheme | str:
        """The site's scheme, or the reason it is kept in full precision."""
        method, bits, group, symmetric = self.method, self.bits, self.group_size, self.symmetric
        for settings in self._settings(site):
            method = settings.method or method
            bits = settings.bits or bits
            group = settings.group_size or group
            symmetric = symmetric if settings.symmetric is None else settings.symmetric
        if bits == FULL:
            return "16 bits asked for"
        if site.parts and self.qkv == "skip":
            return "fused projection, --qkv skip"
        grid = Grid(bits, group, symmetric)
        try:
            grid.width(site.columns)
        except ValueError as error:
            raise VlmqError(f"{site.name}: {error}") from error
        return Scheme(method, grid, self._rows(site))

    def _settings(self, site: Site) -> Iterator[Settings]:
        if site.component in self.components:
            yield self.components[site.component]
        yield from (rule for rule in self.rules if re.search(rule.match, site.name))

    def _rows(self, site: Site) -> tuple[slice, ...] | None:
        if not site.parts or self.qkv == "fused":
            return None
        parts = ("v",) if self.qkv == "v-only" else site.parts
        return tuple(site.part_rows(part) for part in parts)


def read_recipe(file: Path) -> Recipe:
    """A recipe from a YAML file; VlmqError naming the file and the key that is wrong."""
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise VlmqError(f"{file}: cannot be read ({error.strerror}); name a recipe file") from error
    except yaml.YAMLError as error:
        raise VlmqError(f"{file}: not YAML ({str(error).splitlines()[0]}); see docs/recipes.md") from error
    return make_recipe(content or {}, str(file))


def make_recipe(content: dict, where: str = "recipe") -> Recipe:
    """A recipe from plain values, checked; VlmqError with the first thing that is wrong."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise VlmqError(f"{where}: {key + ': ' if key else ''}{what}") from error
