"""Q-VLM's optimisation of the vision encoder (paper 004, section 3.3): the ranges of its rounding, learned.

The whole quantized model runs, and what is learned is how far the range of every vision linear's input and of every
group of its weight is drawn in: 10 epochs of 64 pairs in batches of 8 (section 4.1), with the loss of
`vision_loss.py`. It starts from the vision encoder as it was solved and searched. Connector and language stand in
for what they will be: what their methods fold is folded, their weights are rounded to nearest, and each input within
the percentile that rounds it with the least squared error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmq.exporter import folds
from vlmq.exporter.calibration import Inputs, vision_tokens
from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.learned_rounding import LearnedLinear, Tuned, round_through
from vlmq.exporter.methods import awq, qvlm
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.runtime import open_processor
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.solving import Given, Solved, choose_scale, dense
from vlmq.exporter.statistics import Statistics
from vlmq.exporter.sums import Sums
from vlmq.exporter.vision_loss import Loss, Target, Weights, levels_of, observe, shares_of, target_of
from vlmq.exporter.walk import Walk, walk
from vlmq.kernels.grid import TENSOR, Grid, Limits, round_input, round_trip

PAIRS, BATCH, EPOCHS = 64, 8, 10  # section 4.1
HELD_OUT = 32  # pairs by which the best epoch is told
RATE = 0.003
ROWS = 1024  # of an input, by which its percentile is chosen

Batch = list[Inputs]  # of a few lengths; the pairs of one length run together


@torch.enable_grad()
def tune(
    checkpoint: Checkpoint,
    batches: Sequence[Inputs],
    schemes: Mapping[str, Scheme],
    start: Mapping[str, Solved],
    weights: Weights = Weights(),  # noqa: B008 - frozen
) -> dict[str, Tuned]:
    """The ranges of the vision sites whose scheme asks for it, learned on batches of calibration samples.

    start: what those sites, at least, were solved to without it. The whole model is in memory, float32. That epoch
    counts, the beginning among them, which has the lowest loss on pairs that were not learned from. Samples without an
    image are left out; {} where there is nothing to learn.
    """
    names = [name for name in start if is_tuned(schemes[name])]
    learning, held_out = split(batches)
    if not names or not learning:
        return {}
    plan = walk(checkpoint.skeleton(), checkpoint.family)
    model = checkpoint.model().requires_grad_(False)
    mark = _answer_mark(checkpoint)
    with _watching(model, [name for name in schemes if name not in start]) as sums:
        targets = [_targets(model, plan, batch, mark) for batch in learning]
    statistics = {name: found.statistics() for name, found in sums.items()}
    tests = [target for batch in held_out for target in _targets(model, plan, batch, mark)]
    _fold(plan, Given(checkpoint, model, schemes), start, statistics)
    learned = _round(checkpoint, model, schemes, names, start, statistics)
    every = [target for batch in targets for target in batch]
    levels = levels_of(every, (schemes[names[0]].inputs or schemes[names[0]].grid).bits)
    loss = Loss(weights, levels, shares_of(model, plan, every))
    learn(list(learned.values()), targets, tests, lambda target: loss(observe(model, plan, target.inputs), target))
    return {name: Tuned(linear.limits, linear.clip, start[name].fold) for name, linear in learned.items()}


def learn(
    linears: Sequence[LearnedLinear],
    batches: Sequence[Sequence[Target]],
    tests: Sequence[Target],
    loss: Callable[[Target], Tensor],
) -> list[float]:
    """Adam, a step a batch, in an order drawn with a fixed seed; leaves the parameters of the best epoch.

    The loss over `tests` as it began and after every epoch.
    """
    parameters = [parameter for linear in linears for parameter in linear.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    dice = torch.Generator().manual_seed(0)
    losses, best = [_mean(loss, tests)], _copied(parameters)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(batches), generator=dice).tolist():
            optimizer.zero_grad()
            pairs = sum(target.pairs for target in batches[index])
            for target in batches[index]:  # backward one by one, for memory
                (loss(target) * (target.pairs / pairs)).backward()
            optimizer.step()
            for linear in linears:
                linear.keep_within()
        losses.append(_mean(loss, tests))
        if losses[-1] < min(losses[:-1]):
            best = _copied(parameters)
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return losses


@torch.no_grad()
def _mean(loss: Callable[[Target], Tensor], targets: Sequence[Target]) -> float:
    """The loss over targets, every pair counting the same."""
    return sum(loss(target).item() * target.pairs for target in targets) / sum(target.pairs for target in targets)


def _copied(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def split(batches: Sequence[Inputs]) -> tuple[list[Batch], list[Batch]]:
    """Up to PAIRS pairs to learn from and HELD_OUT others (an eighth, where there are fewer), in batches of BATCH.

    Drawn with a fixed seed; pairs of like length share a batch. A single pair serves for both.
    """
    pairs = [
        {key: value[index : index + 1] for key, value in batch.items()}
        for batch in batches
        if "pixel_values" in batch
        for index in range(len(batch["input_ids"]))
    ]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    apart = min(HELD_OUT, max(len(pairs) - PAIRS, len(pairs) // 8))
    held_out, learning = order[:apart], order[apart : apart + PAIRS]
    return _batched([pairs[index] for index in learning]), _batched([pairs[index] for index in held_out or learning])


def _batched(pairs: list[Inputs]) -> list[Batch]:
    ordered = sorted(pairs, key=lambda pair: pair["input_ids"].shape[1])
    return [_stacked(ordered[start : start + BATCH]) for start in range(0, len(ordered), BATCH)]


def _stacked(pairs: list[Inputs]) -> Batch:
    lengths = sorted({pair["input_ids"].shape[1] for pair in pairs})
    same = [[pair for pair in pairs if pair["input_ids"].shape[1] == length] for length in lengths]
    return [{key: torch.cat([pair[key] for pair in group]) for key in group[0]} for group in same]


def is_tuned(scheme: Scheme | None) -> bool:
    """Whether the ranges of a site with this scheme (None: it is not quantized) are tuned."""
    return scheme is not None and METHODS[scheme.method].percentiles and scheme.options.vision_tuning


def _answer_mark(checkpoint: Checkpoint) -> int:
    """The token that ends the family's template for questions: an answer follows it."""
    template = checkpoint.family.question.rpartition("{}")[2]
    return open_processor(checkpoint.folder).tokenizer(template, add_special_tokens=False)["input_ids"][-1]


@torch.no_grad()
def _targets(model: PreTrainedModel, plan: Walk, batch: Batch, mark: int) -> list[Target]:
    """What the full-precision model makes of a batch."""
    return [
        target_of(observe(model, plan, inputs), inputs, vision_tokens(inputs, model.config), mark) for inputs in batch
    ]


@contextmanager
def _watching(model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, Sums]]:
    """Sums of what the named linears read while the model runs; an embedding, which reads ids, has none."""
    linears = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    sums = {name: Sums(_linear(model, name).in_features) for name in linears}
    hooks = [
        _linear(model, name).register_forward_pre_hook(
            lambda module, args, name=name: sums[name].add(args[0], keep=ROWS * BATCH // PAIRS)
        )
        for name in linears
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _fold(plan: Walk, given: Given, start: Mapping[str, Solved], statistics: dict[str, Statistics]) -> None:
    """Fold what was folded before the sites of `start`, and before the others what their methods fold."""
    for entry in (entry for block in plan.blocks for entry in block.inputs):
        solved = [start[site.name] for site in entry.sites if site.name in start]
        names = [site.name for site in entry.sites if site.name in statistics]
        scale = solved[0].fold if solved else None
        if names and not solved:
            scale = choose_scale(entry, given, statistics[names[0]], _no_trial)
        if scale is not None:
            folds.fold(entry, scale, given.model)
            statistics |= {name: statistics[name].divided_by(scale) for name in names}


def _no_trial(scale: Tensor) -> float:
    raise VlmqError("awq_loss: a scale cannot be tried on a block whose ranges are tuned; set awq_loss: gram")


@torch.no_grad()
def _round(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    schemes: Mapping[str, Scheme],
    names: Sequence[str],
    start: Mapping[str, Solved],
    statistics: Mapping[str, Statistics],
) -> dict[str, LearnedLinear]:
    """Make the model round as its schemes say, in place; the linears that learn how, by name: those of `names`."""
    learned = {}
    for name, scheme in schemes.items():
        linear, dtype = _linear(model, name), checkpoint.dtype(f"{name}.weight")
        if name in names:
            learned[name] = _learned(linear, start[name], dtype)
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, learned[name])
        elif name in start:
            linear.weight.copy_(dense(start[name].weight))
            _round_inputs(linear, scheme.inputs, start[name].limits)
        else:
            for part in scheme.rows or (slice(0, len(linear.weight)),):
                linear.weight[part] = round_trip(linear.weight[part], scheme.grid, dtype)
            if scheme.inputs and name in statistics:
                _round_inputs(linear, scheme.inputs, _best(statistics[name].rows, scheme.inputs))
    return learned


def _learned(linear: nn.Linear, start: Solved, dtype: torch.dtype) -> LearnedLinear:
    """A linear that begins as it was solved."""
    rounded, grid = dense(start.weight), start.scheme.grid
    runs = start.scheme.rows or (slice(0, len(rounded)),)
    clips = [_clip(linear.weight[rows], rounded[rows], grid, dtype) for rows in runs]
    return LearnedLinear(linear, start.scheme, dtype, start.limits, clips)


def _clip(weight: Tensor, rounded: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The factor of each group's range (out, groups) that a weight was rounded with, of those that awq tries."""
    losses = torch.stack([(round_trip(weight, grid, dtype, shrink) - rounded).square() for shrink in awq.SHRINKS])
    losses = losses.unflatten(-1, (-1, grid.width(weight.shape[1]))).sum(-1)
    if grid.group == TENSOR:
        losses = losses.sum((1, 2), keepdim=True).expand_as(losses)
    return torch.tensor(awq.SHRINKS)[losses.argmin(0)]


def _round_inputs(linear: nn.Linear, grid: Grid | None, limits: Limits | None) -> None:
    """Round the input of a linear whenever it comes; gradients pass through."""
    if grid is not None:
        linear.register_forward_pre_hook(lambda module, args: (round_through(args[0], grid, limits), *args[1:]))


def _best(rows: Tensor, grid: Grid) -> Limits:
    """The limits of the percentile that rounds rows of an input (k, in) with the least squared error."""
    candidates = [qvlm.limits_at(rows, percentile) for percentile in qvlm.PERCENTILES]
    return min(candidates, key=lambda limits: (round_input(rows, grid, limits) - rows).square().sum().item())


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    return model.get_submodule(name)  # type: ignore[return-value]   # the walk says that sites are linears
