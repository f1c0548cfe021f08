"""Q-VLM's optimisation of the vision encoder (paper 004, section 3.3): the ranges of its rounding, learned.

The whole quantized model runs, and what is learned is how far the range of every vision linear's input and of every
group of its weight is drawn in: 10 epochs of 64 pairs in batches of 8 (section 4.1), with the loss of
`vision_loss.py`. As in the paper it starts from the ranges that are best site by site: the percentile that rounds
the input with the least squared error, and the clip of the weight that its Gram matrix gives. Connector and language
stay at their percentiles meanwhile, their weights rounded to nearest.
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
from vlmq.exporter.solving import Given, choose_scale
from vlmq.exporter.statistics import Statistics, evenly
from vlmq.exporter.vision_loss import Loss, Target, Weights, levels_of, observe, shares_of, target_of
from vlmq.exporter.walk import Walk, walk
from vlmq.kernels.grid import Grid, Limits, round_input, round_trip

PAIRS, BATCH, EPOCHS = 64, 8, 10  # section 4.1
HELD_OUT = 32  # pairs by which the best epoch is told
RATE = 0.01
ROWS = 1024  # of an input, by which its first percentile is chosen

Batch = list[Inputs]  # of a few lengths; the pairs of one length run together


@torch.enable_grad()
def tune(
    checkpoint: Checkpoint,
    batches: Sequence[Inputs],
    schemes: Mapping[str, Scheme],
    weights: Weights = Weights(),  # noqa: B008 - frozen
) -> dict[str, Tuned]:
    """The ranges of the vision sites whose scheme asks for it, learned on batches of calibration samples.

    The whole model is in memory, float32. That epoch counts, the beginning among them, which has the lowest loss on
    pairs that were not learned from. Samples without an image are left out; {} where there is nothing to learn.
    """
    plan = walk(checkpoint.skeleton(), checkpoint.family)
    names = [site.name for site in plan.sites if site.component == "vision" and is_tuned(schemes.get(site.name))]
    learning, held_out = split(batches)
    if not names or not learning:
        return {}
    model = checkpoint.model().requires_grad_(False)
    mark = _answer_mark(checkpoint)
    with _watching(model, names, schemes) as seen:
        targets = [_targets(model, plan, batch, mark) for batch in learning]
    tests = [target for batch in held_out for target in _targets(model, plan, batch, mark)]
    scales = _fold(plan, Given(checkpoint, model, schemes), seen[0])
    learned = _round(checkpoint, model, schemes, seen)
    every = [target for batch in targets for target in batch]
    levels = levels_of(every, (schemes[names[0]].inputs or schemes[names[0]].grid).bits)
    loss = Loss(weights, levels, shares_of(model, plan, every))
    learn(list(learned.values()), targets, tests, lambda target: loss(observe(model, plan, target.inputs), target))
    return {name: Tuned(linear.limits, linear.clip, scales.get(name)) for name, linear in learned.items()}


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
def _watching(
    model: PreTrainedModel, names: Sequence[str], schemes: Mapping[str, Scheme]
) -> Iterator[tuple[dict[str, Statistics], dict[str, list[Tensor]]]]:
    """Statistics of what the named linears read while the model runs, and rows of what the others do."""
    statistics = {name: Statistics.empty(_linear(model, name).in_features) for name in names}
    linears = [name for name in schemes if isinstance(model.get_submodule(name), nn.Linear)]  # an embedding reads ids
    rows: dict[str, list[Tensor]] = {name: [] for name in linears if name not in statistics}

    def note(name: str, x: Tensor) -> None:
        keep = ROWS * BATCH // PAIRS
        if name in statistics:
            statistics[name].add(x, keep=keep)
            return
        flat = x.reshape(-1, x.shape[-1])
        rows[name].append(flat[evenly(len(flat), keep)].float())

    hooks = [
        _linear(model, name).register_forward_pre_hook(lambda module, args, name=name: note(name, args[0]))
        for name in linears
    ]
    try:
        yield statistics, rows
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _fold(plan: Walk, given: Given, statistics: dict[str, Statistics]) -> dict[str, Tensor]:
    """Fold what the methods fold before the tuned inputs, so that ranges are learned of what will be read: by site."""
    scales: dict[str, Tensor] = {}
    for entry in (entry for block in plan.blocks for entry in block.inputs):
        names = [site.name for site in entry.sites if site.name in statistics]
        scale = choose_scale(entry, given, statistics[names[0]], _no_trial) if names else None
        if scale is not None:
            folds.fold(entry, scale, given.model)
            scales |= dict.fromkeys(names, scale)
            statistics |= {name: statistics[name].divided_by(scale) for name in names}
    return scales


def _no_trial(scale: Tensor) -> float:
    raise VlmqError("awq_loss: a scale cannot be tried on a block whose ranges are tuned; set awq_loss: gram")


def _round(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    schemes: Mapping[str, Scheme],
    seen: tuple[dict[str, Statistics], dict[str, list[Tensor]]],
) -> dict[str, LearnedLinear]:
    """Make the model round as its schemes say, in place; the linears that learn how, by name."""
    statistics, rows = seen
    learned = {}
    for name, scheme in schemes.items():
        linear, dtype = _linear(model, name), checkpoint.dtype(f"{name}.weight")
        if name in statistics:
            learned[name] = _learned(linear, scheme, dtype, statistics[name])
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, learned[name])
        else:
            _fix(linear, scheme, dtype, torch.cat(rows[name]) if name in rows else None)
    return learned


def _learned(linear: nn.Linear, scheme: Scheme, dtype: torch.dtype, seen: Statistics) -> LearnedLinear:
    extremes = Limits(seen.low.min().item(), seen.high.max().item())
    start = _best(seen.rows, scheme.inputs) if scheme.inputs else extremes
    runs = scheme.rows or (slice(0, len(linear.weight)),)
    clips = [awq.clip(linear.weight[rows], seen, scheme.grid, dtype) for rows in runs]
    return LearnedLinear(linear, scheme, dtype, extremes, start, clips)


@torch.no_grad()
def _fix(linear: nn.Linear, scheme: Scheme, dtype: torch.dtype, rows: Tensor | None) -> None:
    """Round a linear (or an embedding, which has no rows) for good: its weight to nearest, and its input whenever it
    comes, through which gradients pass."""
    for part in scheme.rows or (slice(0, len(linear.weight)),):
        linear.weight[part] = round_trip(linear.weight[part], scheme.grid, dtype)
    grid = scheme.inputs
    if grid is not None and rows is not None:
        limits = _best(rows, grid)
        linear.register_forward_pre_hook(lambda module, args: (round_through(args[0], grid, limits), *args[1:]))


def _best(rows: Tensor, grid: Grid) -> Limits:
    """The limits of the percentile that rounds rows of an input (k, in) with the least squared error."""
    candidates = [qvlm.limits_at(rows, percentile) for percentile in qvlm.PERCENTILES]
    return min(candidates, key=lambda limits: (round_input(rows, grid, limits) - rows).square().sum().item())


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    return model.get_submodule(name)  # type: ignore[return-value]   # the walk says that sites are linears
