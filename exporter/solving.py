"""Solving one block: statistics of what its linears read, folds, codes, and the weights that will be written.

The block comes with its full-precision weights and leaves with the quantized ones.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, nn

from vlmq.exporter import folds, heap, workers
from vlmq.exporter.calibration import Call, Wanted, gather
from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.devices import CPU
from vlmq.exporter.learned_rounding import Tuned
from vlmq.exporter.methods import gptq
from vlmq.exporter.methods.problem import Problem, Trial
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.methods.rounded import limits_of
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.statistics import Statistics, evenly, output_loss
from vlmq.exporter.walk import Block, Input
from vlmq.kernels.grid import TENSOR, Grid, Limits, QuantizedWeight, round_trip, to_grid

Schemes = Mapping[str, Scheme]  # of the sites that are quantized, by name
Stored = TypeVar("Stored", QuantizedWeight, Tensor)
LOSS_ROWS = 256  # of a weight, whose error is measured: all of it would cost as much as solving it


@dataclass(frozen=True)
class Solved:
    """What one site became: its codes, or, where only some of its rows are quantized, the dense weight they give.

    fold: the scale (in,) that was folded before its input; None: nothing was.
    limits: of its input, where they are not the input's own.
    loss: tr(D H D^T) / tr(W H W^T), the relative squared error of its outputs on the calibration samples; of LOSS_ROWS
    of its rows, evenly drawn.
    """

    weight: QuantizedWeight | Tensor
    scheme: Scheme
    fold: Tensor | None
    loss: float | None
    limits: Limits | None = None


@dataclass(frozen=True)
class QuantizedBlock:
    """A finished block: what its sites became, and its other tensors that a fold changed, in the source's dtype.

    rows: of the inputs of its sites, by site, where their ranges are still to be searched.
    """

    block: Block
    sites: dict[str, Solved]
    changed: dict[str, Tensor]
    rows: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Given:
    """What is known of all blocks before the first is solved.

    device: where blocks are solved. tell: is called with the name of what is being solved. vision_weights: what an
    image token counts in a block, where tokens are weighted. tuned: by site, where the ranges of a component were
    tuned together.
    """

    checkpoint: Checkpoint
    model: nn.Module
    schemes: Schemes
    device: torch.device = CPU
    tell: Callable[[str], None] = lambda name: None
    vision_weights: Mapping[str, float] = field(default_factory=dict)
    tuned: Mapping[str, Tuned] = field(default_factory=dict)


def solve_block(block: Block, given: Given, calls: Collection[Call]) -> QuantizedBlock:
    """Quantize a block whose weights are filled; where no worker has calls, without statistics.

    It is solved where its weights are; what it became lies in the processor's memory.
    """
    model, schemes = given.model, given.schemes
    module = model.get_submodule(block.name)
    given.tell(block.name)
    before = {
        name: tensor.clone()
        for name, tensor in module.named_parameters(block.name)
        if name.removesuffix(".weight") not in schemes
    }
    statistics: list[Statistics | None] = [None] * len(block.inputs)
    outputs: list[Tensor] = []
    if workers.number(len(calls)):
        wanted = [_wanted(entry, block, given) for entry in block.inputs]
        sought = [schemes[site.name].options.awq_loss for site in block.sites if site.name in schemes]
        statistics[:], outputs = gather(block, model, calls, wanted, all_outputs="block" in sought)

    first = next(iter(calls), None) if _is_rescaled(block, given) else None
    unfolded = first and (outputs[0] if first.dtype == torch.float32 else first.run(module, exact=True))
    folded = _folded(block, given, statistics, lambda: _block_error(module, calls, outputs))
    if first and unfolded is not None and any(scale is not None for scale in folded.values()):
        folds.check(block.name, unfolded, first.run(module, exact=True))

    solved: dict[str, Solved] = {}
    rows: dict[str, Tensor] = {}
    for entry in block.inputs:
        seen = statistics.pop(0)  # its memory is free for the next
        names = [site.name for site in entry.sites if site.name in schemes]
        given.tell(", ".join(names))
        weights = solve_input(names, given, seen)
        for name, weight in weights.items():
            solved[name] = _solved(name, weight, given, seen, folded[name])
            if seen is not None and _is_searched(name, given):
                rows[name] = seen.rows.cpu()
        heap.give_back()
    changed = _settle(block, given, before, solved)
    return QuantizedBlock(block, {name: _home(each) for name, each in solved.items()}, changed, rows)


def _folded(
    block: Block, given: Given, statistics: list[Statistics | None], block_error: Callable[[], float]
) -> dict[str, Tensor | None]:
    """Fold a scale before every input that wants one, and divide its statistics, in place; the scale of each site."""
    folded: dict[str, Tensor | None] = {}
    for index, entry in enumerate(block.inputs):
        seen = statistics[index]
        scale = _rescale(entry, given, seen, block_error)
        if scale is not None and seen is not None:
            folds.fold(entry, scale, given.model)
            statistics[index] = seen.divided_by(scale)
        folded |= {site.name: scale for site in entry.sites}
    return folded


def _home(solved: Solved) -> Solved:
    """What a site became, in the processor's memory."""
    found = solved.weight
    weight = found.cpu() if isinstance(found, Tensor) else found.to(CPU)
    return replace(solved, weight=weight, fold=None if solved.fold is None else solved.fold.cpu())


def _wanted(entry: Input, block: Block, given: Given) -> Wanted:
    """What the methods of the linears that read an input need to know of it."""
    schemes = [given.schemes[site.name] for site in entry.sites if site.name in given.schemes]
    weighted = any(scheme.options.token_weights == "modality" for scheme in schemes)
    return Wanted(
        sums=bool(schemes),
        rows=any(scheme.inputs is not None for scheme in schemes),
        cross=any(is_asymmetric(scheme) for scheme in schemes),
        vision_weight=given.vision_weights.get(block.name, 1.0) if weighted else 1.0,
    )


def is_asymmetric(scheme: Scheme) -> bool:
    """Whether its method aims at what the full-precision model puts out."""
    return METHODS[scheme.method].solve is gptq.solve and scheme.options.gptaq


def _is_rescaled(block: Block, given: Given) -> bool:
    """Whether a scale may be folded before an input."""
    names = [site.name for site in block.sites if site.name in given.schemes]
    return any(name in given.tuned or METHODS[given.schemes[name].method].rescale for name in names)


def _is_searched(name: str, given: Given) -> bool:
    """Whether the range of a site's input is searched for, and not tuned already."""
    scheme = given.schemes[name]
    return METHODS[scheme.method].percentiles and scheme.inputs is not None and name not in given.tuned


def _rescale(entry: Input, given: Given, seen: Statistics | None, block_error: Callable[[], float]) -> Tensor | None:
    """The scale to fold before an input; None where there is nowhere to fold it, or no method that wants one."""
    tuned = [given.tuned[site.name] for site in entry.sites if site.name in given.tuned]
    if tuned:
        scale = tuned[0].scale  # the ranges were learned of what it leaves
        return None if scale is None else scale.to(given.device)
    if seen is None:
        return None

    def trial(scale: Tensor) -> float:
        with _as_if_scaled([site.name for site in entry.sites if site.name in given.schemes], given, scale):
            return block_error()

    return choose_scale(entry, given, seen, trial)


def choose_scale(entry: Input, given: Given, seen: Statistics, trial: Trial) -> Tensor | None:
    """The scale (in,) that the methods of the linears that read an input agree on; None: none is wanted, or best.

    All that are quantized count, if one of them asks.
    """
    names = [site.name for site in entry.sites if site.name in given.schemes]
    rescales = [METHODS[given.schemes[name].method].rescale for name in names]
    asked = next((place for place, rescale in enumerate(rescales) if rescale), None)
    if entry.source is None or asked is None:
        return None
    names = [names[asked], *names[:asked], *names[asked + 1 :]]
    weights = [
        _joined([given.model.get_parameter(f"{name}.weight")[rows] for rows in _rows(given, name)]) for name in names
    ]
    problem = Problem(weights, [given.schemes[name] for name in names], seen, _dtype(given, names[0]), trial)
    scale = rescales[asked](problem)  # type: ignore[misc]   # the one that is there
    return None if bool((scale == 1).all()) else scale


def _block_error(module: nn.Module, calls: Iterable[Call], outputs: Iterable[Tensor]) -> float:
    """How far a block's outputs are from what they were, as a sum of squares over all workers' calls."""
    errors = [(call.run(module) - output).square().sum().item() for call, output in zip(calls, outputs, strict=True)]
    return workers.number(sum(errors))


@contextmanager
def _as_if_scaled(names: list[str], given: Given, scale: Tensor) -> Iterator[None]:
    """The weights as they act when scaled, rounded and divided again: the input may then stay as it is."""
    parameters = [given.model.get_parameter(f"{name}.weight") for name in names]
    kept = [parameter.clone() for parameter in parameters]
    for name, parameter in zip(names, parameters, strict=True):
        for rows in _rows(given, name):
            scaled = parameter[rows] * scale
            parameter[rows] = round_trip(scaled, given.schemes[name].grid, _dtype(given, name)) / scale
    try:
        yield
    finally:
        for parameter, weight in zip(parameters, kept, strict=True):
            parameter.copy_(weight)


def solve_input(names: list[str], given: Given, seen: Statistics | None) -> dict[str, QuantizedWeight | Tensor]:
    """Codes for the linears that read one input; those with the same scheme are stacked into one solve."""
    pieces = [(name, rows) for name in names for rows in _rows(given, name)]
    parts: dict[str, list[QuantizedWeight]] = {name: [] for name in names}
    for _, together in groupby(pieces, key=lambda piece: _stacking(given, *piece)):
        members = list(together)
        weights = [given.model.get_parameter(f"{name}.weight")[rows] for name, rows in members]
        found = _solve_rows(*members[0], _joined(weights), given, seen)
        start = 0
        for (name, _), weight in zip(members, weights, strict=True):
            parts[name].append(_take(found, slice(start, start + len(weight))))
            start += len(weight)
    return {name: _whole(name, found, given) for name, found in parts.items()}


def _joined(weights: list[Tensor]) -> Tensor:
    """One above the other; no copy of one alone, which may be large."""
    return torch.cat(weights) if len(weights) > 1 else weights[0]


def _stacking(given: Given, name: str, rows: slice) -> object:
    """Equal for pieces whose rows may be solved together: a tuned site and a whole tensor's range stand alone."""
    scheme = given.schemes[name]
    alone = scheme.grid.group == TENSOR or name in given.tuned
    return (scheme.method, scheme.grid, scheme.options, (name, rows.start) if alone else None)


def _solve_rows(name: str, rows: slice, weight: Tensor, given: Given, seen: Statistics | None) -> QuantizedWeight:
    """Codes for rows that were stacked; the name and its rows are those of the first, which speaks for all."""
    scheme, dtype = given.schemes[name], _dtype(given, name)
    if name in given.tuned:
        return to_grid(weight, scheme.grid, dtype, given.tuned[name].clip[rows].to(weight.device))
    return METHODS[scheme.method].solve(weight, seen, scheme, dtype)  # type: ignore[arg-type]   # None: not calibrated


def _rows(given: Given, name: str) -> tuple[slice, ...]:
    """The rows of a weight that its scheme quantizes, part by part where it says so."""
    rows = given.schemes[name].rows
    return rows or (slice(0, len(given.model.get_parameter(f"{name}.weight"))),)


def _whole(name: str, parts: list[QuantizedWeight], given: Given) -> QuantizedWeight | Tensor:
    """A site's parts as one weight; dense, in the dtype of the file, where some of its rows are not quantized."""
    weight = given.model.get_parameter(f"{name}.weight")
    if sum(len(part.codes) for part in parts) == len(weight):
        return _stack(parts)
    dense = weight.clone()
    for rows, part in zip(_rows(given, name), parts, strict=True):
        dense[rows] = part.dequantize()
    return dense.to(_dtype(given, name))


def _take(weight: Stored, rows: slice | Tensor) -> Stored:
    """Some rows of a weight, whether codes or dense."""
    if isinstance(weight, Tensor):
        return weight[rows]
    return QuantizedWeight(weight.codes[rows], weight.scale[rows], weight.zero[rows], weight.grid)


def _stack(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """The parts of a fused projection as one weight: rows have scales of their own, so nothing else changes."""
    return QuantizedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.zero for part in parts]),
        parts[0].grid,
    )


def _solved(
    name: str, weight: QuantizedWeight | Tensor, given: Given, seen: Statistics | None, fold: Tensor | None
) -> Solved:
    scheme = given.schemes[name]
    limits = given.tuned[name].limits if name in given.tuned else None
    if limits is None and scheme.inputs is not None and seen is not None:
        limits = limits_of(seen, scheme.inputs)
    loss = None
    if seen is not None:
        weights = given.model.get_parameter(f"{name}.weight")
        drawn = evenly(len(weights), LOSS_ROWS)
        full = weights[drawn]
        error = dense(_take(weight, drawn)) - full
        loss = (output_loss(error, seen.gram) / output_loss(full, seen.gram).clamp(min=1e-30)).item()
    return Solved(weight, scheme, fold, loss, limits)


def dense(weight: QuantizedWeight | Tensor) -> Tensor:
    """A solved weight as a matrix (out, in) float32."""
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()


def _settle(block: Block, given: Given, before: dict[str, Tensor], solved: dict[str, Solved]) -> dict[str, Tensor]:
    """Give the block the weights that will be written, and return those that changed, as they are written."""
    changed = {}
    for name, parameter in given.model.get_submodule(block.name).named_parameters(block.name):
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in solved:
            parameter.copy_(dense(solved[module].weight))
            continue
        if leaf == "bias" and module in solved and solved[module].scheme.options.biases:
            parameter.copy_(_round_bias(parameter, solved[module].scheme))
        stored = parameter.to(given.checkpoint.dtype(name))
        if not torch.equal(parameter, before[name]):
            changed[name] = stored.cpu()
        parameter.copy_(stored)  # a rotated checkpoint's tensors are more precise than a file of it will be
    return changed


def _round_bias(bias: Tensor, scheme: Scheme) -> Tensor:
    """A bias (out,) on one grid of its own, of as many bits as the weight's; stored as it was, as a plain tensor."""
    return round_trip(bias.unsqueeze(0), Grid(scheme.grid.bits, TENSOR, symmetric=False), torch.float32).squeeze(0)


def _dtype(given: Given, name: str) -> torch.dtype:
    return given.checkpoint.dtype(f"{name}.weight")
