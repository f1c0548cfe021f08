"""A choice for every linear as rules of a recipe: what most of a component has first, then what differs, by name.

Blocks that differ alike share a rule, and so do linears of a block that differ in the same blocks.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from vlmq.exporter.families import COMPONENTS
from vlmq.exporter.recipe import Recipe, make_recipe
from vlmq.exporter.search.sensitivity import Choice
from vlmq.exporter.settings import FULL, Settings
from vlmq.exporter.walk import Block, Walk

_NUMBERED = re.compile(r"(.*)\.(\d+)")  # a block in a list of blocks


def with_rules(base: Recipe, walk: Walk, chosen: Mapping[str, Choice]) -> Recipe:
    """The recipe with rules that give every linear of the blocks its choice, and 16 bits where there is none."""
    content = base.content()
    return make_recipe(content | {"rules": [*content.get("rules", ()), *_rules(walk, chosen)]}, "allocated recipe")


def _rules(walk: Walk, chosen: Mapping[str, Choice]) -> list[dict[str, Any]]:
    usual, special = [], []
    for component in COMPONENTS:
        stages = [
            stage
            for stage in walk.stages
            if stage[0].component == component and stage[0].sites[0].kind not in ("embedding", "head")
        ]
        weights: dict[Choice, int] = defaultdict(int)
        for site in (site for stage in stages for block in stage for site in block.sites):
            weights[chosen.get(site.name, Choice(FULL))] += site.rows * site.columns
        if not weights:
            continue
        default = max(weights, key=lambda choice: (weights[choice], choice.bits))
        usual.append({"component": component, **_said(default)})
        for stage in stages:
            special += _deviations(stage, chosen, default)
    return usual + special


def _deviations(stage: tuple[Block, ...], chosen: Mapping[str, Choice], default: Choice) -> list[dict[str, Any]]:
    blocks_of: dict[tuple[Choice, str], list[str]] = defaultdict(list)  # choice and linear -> names of blocks
    for block in stage:
        for site in block.sites:
            choice = chosen.get(site.name, Choice(FULL))
            if choice != default:
                blocks_of[choice, site.name.removeprefix(block.name)].append(block.name)
    linears_of: dict[tuple[Choice, tuple[str, ...]], list[str]] = defaultdict(list)
    for (choice, linear), names in blocks_of.items():
        linears_of[choice, tuple(names)].append(linear)
    return [
        {"match": f"^{_blocks(names, stage)}{_one_of([re.escape(linear) for linear in linears])}$", **_said(choice)}
        for (choice, names), linears in linears_of.items()
    ]


def _blocks(names: tuple[str, ...], stage: tuple[Block, ...]) -> str:
    """A regular expression for the names of some blocks of a stage."""
    numbered = [_NUMBERED.fullmatch(name) for name in names]
    if not all(numbered):
        return _one_of([re.escape(name) for name in names])
    path, numbers = numbered[0][1], [found[2] for found in numbered if found]  # type: ignore[index]
    number = r"\d+" if 1 < len(names) == len(stage) else _one_of(numbers)
    return rf"{re.escape(path)}\.{number}"


def _one_of(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"


def _said(choice: Choice) -> dict[str, Any]:
    if choice.group is None or choice.bits == FULL:
        return {"bits": choice.bits}
    return Settings.model_validate({"bits": choice.bits, "group_size": choice.group}).model_dump(
        mode="json", exclude_none=True
    )
