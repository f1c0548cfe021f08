"""Quantizing: one block after the other, each on what the quantized blocks before it put out.

For every block: read its weights (the system reads ahead while the one before is solved), solve it (`solving.py`), and
run it as it will be, its inputs rounded too where the recipe says so, to get the next block's inputs. Where ranges are
searched across layers, a few blocks stay in memory until theirs are found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from vlmq.exporter import crosslayer, ends, heap, modality, vision_tuning, workers
from vlmq.exporter.calibration import Calibration, Call
from vlmq.exporter.checkpoint import Checkpoint, release, tie
from vlmq.exporter.devices import CPU
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.journal import Journal
from vlmq.exporter.methods.registry import METHODS, is_calibrated
from vlmq.exporter.progress import Progress, silent
from vlmq.exporter.recipe import Assignment
from vlmq.exporter.rounding import InputRounding
from vlmq.exporter.solving import Given, QuantizedBlock, Solved, is_asymmetric, solve_block
from vlmq.exporter.walk import Block, Walk


@torch.no_grad()
def quantize(
    checkpoint: Checkpoint,
    model: nn.Module,
    walk: Walk,
    assignment: Assignment,
    calibration: Calibration | None,
    progress: Progress = silent,
    journal: Journal | None = None,
    device: torch.device = CPU,
) -> Iterator[QuantizedBlock]:
    """Every block in the order it runs; `calibration` is None when no method of the assignment looks at inputs.

    journal: where every block is made durable before it is handed out, and from which those that an earlier run
    finished come. device: where blocks are calibrated and solved, one after the other.
    """
    stages = [stage for stage in walk.stages if not ends.is_embedding(stage)]
    blocks = [block for stage in stages for block in stage]
    done = journal.done if journal else 0
    given = Given(
        checkpoint, model, assignment.schemes, device, lambda name: progress("quantizing", done, len(blocks), name)
    )
    for stage in walk.stages[: len(walk.stages) - len(stages)]:
        yield ends.quantize_embedding(stage[0], given)
    if journal:
        yield from journal.blocks(blocks, given.schemes)
    if calibration and done < len(blocks):
        given = _prepared(given, calibration)
        if journal and journal.state:
            calibration.restore(journal.state, stages)
    for stage in stages:
        ahead = done - blocks.index(stage[0])  # of its blocks are finished
        if ahead >= len(stage):
            continue
        calls: dict[int, Call] = {}
        if calibration:
            with _outside(given, walk):
                calls = calibration.calls(stage)
            _check_seen(stage, given, calibration)
        with ends.unread(model, stage):
            if calibration and _is_tuned(stage, given):
                given = _tuned(stage, given, calibration, list(calls.values()))
            if calibration and journal and journal.state and ahead > 0:
                spans = [tuple(stage[first:last]) for first, last in journal.state["spans"]]
                calibration.resume(journal.state, calls)
            else:
                spans = _spans(stage, given, list(calls.values()))
            places = [[stage.index(span[0]), stage.index(span[-1]) + 1] for span in spans]
            for span in spans:
                if stage.index(span[0]) < ahead:
                    continue
                heap.give_back()
                progress("quantizing", done, len(blocks))
                if done + len(span) < len(blocks):
                    checkpoint.read_ahead(blocks[done + len(span)].name)
                last = span[-1] is stage[-1] and not _is_read_whole(stage, walk)
                found = _quantize_span(span, given, list(calls.values()), last)
                done += len(span)
                if calibration and span[-1] is stage[-1]:
                    calibration.finish(stage, calls)
                if journal:
                    journal.step(found, {**calibration.state(calls), "spans": places} if calibration else None)
                yield from found
    progress("quantizing", len(blocks), len(blocks))


def needs_reference(assignment: Assignment) -> bool:
    """Whether the full-precision model must run alongside: some method aims at what it puts out."""
    return any(is_asymmetric(scheme) or METHODS[scheme.method].percentiles for scheme in assignment.schemes.values())


def refuse_for_workers(assignment: Assignment) -> None:
    """VlmqError for a method that looks at some of the samples by themselves, where these lie on several workers."""
    searching = [name for name, scheme in assignment.schemes.items() if METHODS[scheme.method].percentiles]
    if searching and workers.count() > 1:
        method = assignment.schemes[searching[0]].method
        raise VlmqError(
            f"{searching[0]}: {method} searches ranges on samples of its own choice, which {workers.count()} workers "
            "have only parts of; start one, without torchrun, or choose another method"
        )


def _prepared(given: Given, calibration: Calibration) -> Given:
    """What has to be known of the whole model before its first block: the weights of tokens."""
    if any(scheme.options.token_weights == "modality" for scheme in given.schemes.values()):
        weights = modality.floored(modality.weights(given.checkpoint, calibration.batches))
        return replace(given, vision_weights=weights)
    return given


def _is_tuned(stage: tuple[Block, ...], given: Given) -> bool:
    sites = [site for block in stage for site in block.sites if site.component == "vision"]
    return any(vision_tuning.is_tuned(given.schemes.get(site.name)) for site in sites)


def _tuned(stage: tuple[Block, ...], given: Given, calibration: Calibration, calls: list[Call]) -> Given:
    """The ranges of a stage of the vision encoder, tuned from what its sites are solved to without it.

    calls: at the stage's start, where they are left.
    """
    streams = [*calls, *(call.reference for call in calls if call.reference)]
    places = [call.place for call in streams]
    start: dict[str, Solved] = {}
    for span in _spans(stage, given, calls):
        for found in _quantize_span(span, given, calls, last=span[-1] is stage[-1]):
            start |= found.sites
    for call, place in zip(streams, places, strict=True):
        call.place = place
    return replace(given, tuned=vision_tuning.tune(given.checkpoint, calibration.batches, given.schemes, start))


def _spans(stage: tuple[Block, ...], given: Given, calls: list[Call]) -> list[tuple[Block, ...]]:
    """The blocks that are searched together: one by one, but for a method that minds what layers do to each other."""
    schemes = [given.schemes[site.name] for block in stage for site in block.sites if site.name in given.schemes]
    minding = [scheme for scheme in schemes if METHODS[scheme.method].percentiles and scheme.options.cross_layer]
    tuned = any(site.name in given.tuned for block in stage for site in block.sites)
    if not calls or tuned or len(stage) < 2 or not minding or minding[0].inputs is None:
        return [(block,) for block in stage]
    found = crosslayer.dependencies(stage, given.model, given.checkpoint, calls, minding[0].inputs.bits)
    return crosslayer.spans(stage, found, minding[0].options.threshold)


def _quantize_span(span: tuple[Block, ...], given: Given, calls: list[Call], last: bool) -> list[QuantizedBlock]:
    """Solve the blocks of a span and run them on, the ranges of their inputs searched where a method does that: block
    by block, so that each is solved on what the ones before it will put out, then for all of the span together."""
    starts = [call.place for call in calls]
    finished: list[QuantizedBlock] = []
    roundings: list[InputRounding] = []

    def search(blocks: tuple[Block, ...]) -> None:
        rows = {name: kept for found in finished[-len(blocks) :] for name, kept in found.rows.items()}
        if rows:
            ends_here = last and blocks[-1] is span[-1]
            limits = crosslayer.search(blocks, given.model, calls, roundings[-len(blocks) :], rows, ends_here)
            finished[:] = [_with_limits(found, limits) for found in finished]

    for block in span:
        module = given.model.get_submodule(block.name)
        given.checkpoint.fill(module, block.name, device=given.device)
        finished.append(solve_block(block, given, calls))
        roundings.append(_rounding(given.model, finished[-1]))
        search((block,))
        _run(module, calls)
    if len(span) > 1:
        for call, start in zip(calls, starts, strict=True):
            call.place = start
        search(span)
        for block in span:
            _run(given.model.get_submodule(block.name), calls)
    for block, rounding in zip(span, roundings, strict=True):
        rounding.remove()
        release(given.model.get_submodule(block.name))
    heap.give_back()
    return finished


def _rounding(model: nn.Module, found: QuantizedBlock) -> InputRounding:
    """The inputs of a block's sites rounded as they will be."""
    grids = {name: solved.scheme.inputs for name, solved in found.sites.items() if solved.scheme.inputs}
    return InputRounding(model, grids, {name: found.sites[name].limits for name in grids})


def _with_limits(found: QuantizedBlock, limits: dict) -> QuantizedBlock:
    sites = {name: replace(solved, limits=limits.get(name, solved.limits)) for name, solved in found.sites.items()}
    return replace(found, sites=sites)


def _run(module: nn.Module, calls: list[Call]) -> None:
    for call in calls:
        call.hidden = call.run(module)


@contextmanager
def _outside(given: Given, walk: Walk) -> Iterator[None]:
    """What lies outside the blocks and runs before them is in memory: embeddings, norms, query tokens; not the head."""
    skipped = tuple(f"{name}." for name in (*(block.name for block in walk.blocks), *walk.kept))
    found = [
        (name, module)
        for name, module in given.model.named_modules()
        if not f"{name}.".startswith(skipped)
        and any(parameter.is_meta for parameter in module.parameters(recurse=False))  # a quantized embedding is there
    ]
    for name, module in found:
        given.checkpoint.fill(module, name, recurse=False)
    tie(given.model, [name for name, _ in found], given.checkpoint.places)
    yield
    for _, module in found:
        release(module, recurse=False)


def _is_read_whole(stage: tuple[Block, ...], walk: Walk) -> bool:
    """Whether what a stage puts out for the image is read: an encoder's is, by the decoder's blocks."""
    return any(block.answers for block in walk.blocks) and not stage[0].answers


def _check_seen(stage: tuple[Block, ...], given: Given, calibration: Calibration) -> None:
    schemes = [given.schemes[site.name] for block in stage for site in block.sites if site.name in given.schemes]
    if not calibration.reaching(stage) and any(is_calibrated(scheme) for scheme in schemes):
        what = stage[0].component
        raise VlmqError(f"calibration: no sample has an image, and the {what} sees nothing else; pass --{what}-bits 16")
