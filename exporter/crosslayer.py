"""Q-VLM's two steps on running blocks (paper 004, section 3.2): which depend on each other, and their joint search.

The mathematics is in `methods/qvlm.py`. Both steps run a part of the calibration samples only, and neither changes a
call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmq.exporter.calibration import Call
from vlmq.exporter.checkpoint import Checkpoint, release
from vlmq.exporter.methods import qvlm
from vlmq.exporter.rounding import InputRounding
from vlmq.exporter.walk import Block
from vlmq.kernels.grid import Limits

TOKENS = 4096  # of the calibration samples that run
ELEMENTS = 16384  # of a block's output that its distribution is taken from


@torch.no_grad()
def dependencies(
    stage: Sequence[Block], model: nn.Module, checkpoint: Checkpoint, calls: Sequence[Call], bits: int
) -> list[float]:
    """D(k, k + 1) of eq. 4 for the neighbouring blocks of a stage, in nats an element; one fewer than blocks.

    The full-precision blocks run on full-precision hidden states where these are known, with 2**bits levels between
    the extremes of each block's output. One block at a time is in memory.
    """
    running = [call.reference or call for call in _some(calls)]
    hidden = [call.hidden for call in running]
    chosen = _positions(hidden)
    found: list[float] = []
    before: Tensor | None = None
    for block in stage:
        module = model.get_submodule(block.name)
        checkpoint.fill(module, block.name)
        hidden = [call.run(module, each) for call, each in zip(running, hidden, strict=True)]
        release(module)
        assigned = _assigned(hidden, chosen, bits)
        if before is not None:
            found.append(qvlm.conditional_entropy(before, assigned).item())
        before = assigned
    return found


def spans(stage: Sequence[Block], dependencies: Sequence[float], threshold: float | None) -> list[tuple[Block, ...]]:
    """The blocks of a stage as they are searched together: eq. 7, at most three."""
    return [tuple(stage[index] for index in indices) for indices in qvlm.partition(dependencies, threshold)]


@torch.no_grad()
def search(
    span: Sequence[Block],
    model: nn.Module,
    calls: Sequence[Call],
    roundings: Sequence[InputRounding],
    rows: Mapping[str, Tensor],
    last: bool = False,
) -> dict[str, Limits]:
    """Eq. 3: for each block of a span the percentile with which the span's output comes nearest to full precision.

    The blocks hold their quantized weights; `calls` are at the start of the span, their references (the target) behind
    it. roundings: one for each block. rows: what the searched sites read (k, in), by site; others keep their limits.
    last: nothing reads what the span puts out for image tokens, so their errors do not count. Errors are relative token
    by token, as the norm that the next block begins with makes them.

    A span of one block is the layer-wise search of eq. 2. Of equally good percentiles the larger is taken, first of the
    first block. Leaves the limits it returns in the roundings.
    """
    layers = [
        _Layer(model.get_submodule(block.name), rounding, _candidates(block, rows))
        for block, rounding in zip(span, roundings, strict=True)
    ]
    some = _some(calls)
    counted = [None if call.vision is None or not last else ~call.vision for call in some]
    _, best = _best(layers, some, counted, [call.hidden for call in some])
    limits: dict[str, Limits] = {}
    for layer, chosen in zip(layers, best, strict=True):
        layer.rounding.limits.update(chosen)
        limits |= chosen
    return limits


Candidate = dict[str, Limits]


@dataclass(frozen=True)
class _Layer:
    """A block of a span, and the limits of its sites at every percentile."""

    module: nn.Module
    rounding: InputRounding
    candidates: tuple[Candidate, ...]


def _candidates(block: Block, rows: Mapping[str, Tensor]) -> tuple[Candidate, ...]:
    searched = [site.name for site in block.sites if site.name in rows]
    percentiles = qvlm.PERCENTILES if searched else (1.0,)  # nothing to choose, but the block runs
    return tuple({name: qvlm.limits_at(rows[name], percentile) for name in searched} for percentile in percentiles)


def _best(
    layers: Sequence[_Layer], calls: Sequence[Call], counted: Sequence[Tensor | None], hidden: list[Tensor]
) -> tuple[float, tuple[Candidate, ...]]:
    """The least error behind the last of the layers, and the candidates that give it.

    counted: the tokens of each call whose errors count; None: all. A tree: candidates of a layer that share those
    before it share what these put out.
    """
    if not layers:
        return _error(calls, counted, hidden), ()
    first, *later = layers
    found: list[tuple[float, tuple[Candidate, ...]]] = []
    for candidate in first.candidates:
        first.rounding.limits.update(candidate)
        outputs = [call.run(first.module, each) for call, each in zip(calls, hidden, strict=True)]
        error, behind = _best(later, calls, counted, outputs)
        found.append((error, (candidate, *behind)))
    return min(found, key=lambda pair: pair[0])  # the first of equals


def _error(calls: Sequence[Call], counted: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> float:
    total = 0.0
    for call, which, output in zip(calls, counted, outputs, strict=True):
        assert call.reference is not None  # the engine runs the full-precision model alongside for this method
        target = call.reference.hidden.to(output.device)
        errors = (output - target).double().square().sum(-1) / target.double().square().sum(-1).clamp(min=1e-12)
        total += (errors if which is None else errors[which.to(errors.device)]).sum().item()
    return total


def _some(calls: Sequence[Call]) -> Sequence[Call]:
    """Calls with about TOKENS tokens in all, evenly drawn; one at least, which may have more."""
    tokens = sum(call.hidden[..., 0].numel() for call in calls)
    return calls[:: max(1, -(-tokens // TOKENS))]


def _positions(hidden: Sequence[Tensor]) -> list[Tensor]:
    """Which elements of each call are looked at, the same in all blocks, ELEMENTS in all; drawn with a fixed seed."""
    dice = torch.Generator().manual_seed(0)
    count = -(-ELEMENTS // len(hidden))
    return [torch.randint(each.numel(), (count,), generator=dice).to(each.device) for each in hidden]


def _assigned(hidden: Sequence[Tensor], chosen: Sequence[Tensor], bits: int) -> Tensor:
    """The assignment of the chosen elements to the levels between the extremes of the whole (elements, levels)."""
    low = torch.stack([each.amin() for each in hidden]).amin().float()
    high = torch.stack([each.amax() for each in hidden]).amax().float()
    elements = torch.cat([each.flatten()[index] for each, index in zip(hidden, chosen, strict=True)])
    return qvlm.soft_assignment(elements.float(), qvlm.levels_between(low, high, bits))
