"""The two ends of the language model, token embedding and output head: left alone unless a recipe asks for them.

The head of an untied model is a linear like any other: a stage of its own after the last block, calibrated on what the
last norm puts out. The embedding is looked up before there is anything to calibrate on, so it is rounded to nearest.
A tied head is the embedding read the other way: both are asked for, on one grid, or neither.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import Family, Reads, Stage
from vlmq.exporter.recipe import Recipe
from vlmq.exporter.settings import FULL
from vlmq.exporter.solving import Given, QuantizedBlock, solve_block
from vlmq.exporter.walk import Block, Input, Site, Walk, walk


@dataclass(frozen=True)
class Ends:
    """The names in memory of the two ends, and whether they have one weight."""

    embedding: str
    head: str
    tied: bool


def find(model: nn.Module) -> Ends:
    """The ends of a transformers model, which may be on the meta device."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    return Ends(names[id(embedding)], names[id(head)], embedding.weight is head.weight)


def plan(checkpoint: Checkpoint, model: nn.Module, recipe: Recipe) -> Walk:
    """The walk, with the ends that the recipe asks for: the embedding's stage the first, the head's the last.

    VlmqError where a tied head and its embedding are not asked for alike.
    """
    ends = find(model)
    head = recipe.head is not None and (recipe.head.bits or recipe.bits) != FULL
    embedding = recipe.embedding is not None and (recipe.embedding.bits or recipe.bits) != FULL
    if ends.tied:
        _refuse_unlike(ends, recipe, head, embedding)
    stored = [weight for weight in getattr(model, "all_tied_weights_keys", {}) if weight in checkpoint.places]
    if embedding and stored:
        raise VlmqError(
            f"{stored[0]}: stored although it is tied to the token embedding; save the checkpoint again, or leave both "
            "alone"
        )
    untied = head and not ends.tied
    found = walk(model, _with_head(checkpoint.family, ends.head) if untied else checkpoint.family)
    if not embedding:
        return found
    kept = found.kept | ({ends.head: "reads the quantized token embedding it is tied to"} if ends.tied else {})
    return replace(found, stages=((_embedding(model, ends.embedding),), *found.stages), kept=kept)


def _refuse_unlike(ends: Ends, recipe: Recipe, head: bool, embedding: bool) -> None:
    if head and not embedding:
        raise VlmqError(
            f"{ends.head}: tied to the token embedding, so quantizing it would quantize the embedding too; "
            "ask for embedding as well, or for neither"
        )
    if embedding and not head:
        raise VlmqError(
            f"{ends.embedding}: tied to the output head, so quantizing it would quantize the head too; "
            "ask for head as well, or for neither"
        )
    if not embedding or recipe.head is None or recipe.embedding is None:
        return
    said = recipe.head
    if (said.method or "rtn") != "rtn" or said.activations is not None or said.options is not None:
        raise VlmqError(
            f"{ends.head}: tied to the token embedding, which is rounded to nearest before anything is calibrated; "
            "leave method, activations and options of head out"
        )
    differing = [
        key
        for key in ("bits", "group_size", "symmetric")
        if _value(said, key, recipe) != _value(recipe.embedding, key, recipe)
    ]
    if differing:
        raise VlmqError(
            f"{ends.head}: tied to the token embedding, so they have one grid; give both the same {differing[0]}"
        )


def _value(settings: object, key: str, recipe: Recipe) -> object:
    said = getattr(settings, key)
    return getattr(recipe, key) if said is None else said


def _with_head(family: Family, head: str) -> Family:
    stage = Stage("language", head, (Reads(("",), "head"),), single=True)
    kept = {name: reason for name, reason in family.kept.items() if name != head}
    return replace(family, stages=(*family.stages, stage), kept=kept)


def _embedding(model: nn.Module, name: str) -> Block:
    rows, columns = model.get_parameter(f"{name}.weight").shape
    return Block(name, "language", 0, (Input((Site(name, "language", 0, "embedding", rows, columns),), None),))


def is_embedding(stage: tuple[Block, ...]) -> bool:
    return stage[0].sites[0].kind == "embedding"


def quantize_embedding(block: Block, given: Given) -> QuantizedBlock:
    """Round the embedding to nearest. It stays in memory: calibration looks its tokens up as the export will."""
    given.checkpoint.fill(given.model.get_submodule(block.name), block.name)
    return solve_block(block, given, ())


@contextmanager
def unread(model: nn.Module, stage: tuple[Block, ...]) -> Iterator[None]:
    """Nothing reads what a head puts out in calibration, a vocabulary for each token: it hands on what it gets."""
    if stage[0].sites[0].kind != "head":
        yield
        return
    head = model.get_submodule(stage[0].name)
    head.forward = lambda hidden: hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
