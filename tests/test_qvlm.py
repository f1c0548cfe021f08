import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from vlmq.exporter import crosslayer, vision_tuning
from vlmq.exporter.calibration import Calibration, Call, prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.learned_rounding import LearnedLinear, round_between
from vlmq.exporter.methods import qvlm
from vlmq.exporter.quantize import quantize
from vlmq.exporter.recipe import Assignment
from vlmq.exporter.rounding import InputRounding
from vlmq.exporter.runtime import open_processor
from vlmq.exporter.scheme import Options, Scheme
from vlmq.exporter.walk import Block, Input, Site, walk
from vlmq.kernels.grid import ROW, TENSOR, Grid, Limits, round_input, round_trip


def textbook_assignment(x, levels):
    """Eq. 5 for one element, in float64."""
    interval = levels[1] - levels[0]
    weights = [math.exp(-((x - level) ** 2) / interval) for level in levels]
    return [weight / sum(weights) for weight in weights]


def textbook_entropy(first, second, levels):
    """H(second | first) in nats of two lists of level numbers, from their histograms, in float64."""
    joint = torch.zeros(levels, levels, dtype=torch.float64)
    for pair in zip(first, second, strict=True):
        joint[pair] += 1 / len(first)
    return -sum(
        joint[a, b] * torch.log(joint[a, b] / joint[a].sum())
        for a in range(levels)
        for b in range(levels)
        if joint[a, b]
    )


def drawn(levels, count=4000, seed=0):
    return torch.randint(levels, (count,), generator=torch.Generator().manual_seed(seed))


def hard(numbers, levels):
    return nn.functional.one_hot(numbers, levels).float()


def test_a_soft_assignment_is_equation_5():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    levels = qvlm.levels_between(-4.0, 5.0, 3)
    expected = [textbook_assignment(value.item(), levels.tolist()) for value in x.double()]
    torch.testing.assert_close(
        qvlm.soft_assignment(x, levels).double(), torch.tensor(expected).double(), atol=1e-6, rtol=0
    )


def test_levels_reach_from_one_limit_to_the_other():
    levels = qvlm.levels_between(torch.tensor(-1.0), torch.tensor(2.0), 4)
    assert len(levels) == 16
    assert levels[0] == -1
    assert levels[-1] == 2


def test_the_conditional_entropy_of_hard_assignments_is_that_of_their_histograms():
    first = drawn(8)
    second = (first + drawn(3, seed=1)) % 8
    found = qvlm.conditional_entropy(hard(first, 8), hard(second, 8))
    expected = textbook_entropy(first.tolist(), second.tolist(), 8)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_soft_assignments_become_hard_as_the_values_grow():
    """The interval divides the exponent once, so what lies between two levels counts the more the larger they are."""
    first = drawn(4)
    second = (first + drawn(2, seed=1)) % 4
    levels = qvlm.levels_between(0.0, 3.0, 2) * 1000
    found = qvlm.conditional_entropy(
        *(qvlm.soft_assignment(numbers * 1000.0 + 100, levels) for numbers in (first, second))
    )
    torch.testing.assert_close(found.double(), textbook_entropy(first.tolist(), second.tolist(), 4), atol=1e-5, rtol=0)


def test_a_copy_has_no_entropy_and_an_independent_layer_all_there_is():
    both = list(itertools.product(range(8), repeat=2))
    first, second = (hard(torch.tensor(numbers), 8) for numbers in zip(*both, strict=True))
    assert qvlm.conditional_entropy(first, first).item() == pytest.approx(0, abs=1e-6)
    assert qvlm.conditional_entropy(first, second).item() == pytest.approx(math.log(8), abs=1e-5)


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_an_entropy_lies_between_0_and_the_logarithm_of_the_levels(spread):
    x = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)) * spread
    levels = qvlm.levels_between(-3 * spread, 3 * spread, 4)
    found = qvlm.conditional_entropy(*(qvlm.soft_assignment(each, levels) for each in x)).item()
    assert 0 <= found <= math.log(16) + 1e-5


def test_an_entropy_has_a_gradient_that_leads_down():
    x = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).requires_grad_()
    levels = qvlm.levels_between(-3.0, 3.0, 4)

    def entropy(values):
        return qvlm.conditional_entropy(*(qvlm.soft_assignment(each, levels) for each in values))

    (gradient,) = torch.autograd.grad(entropy(x), x)
    assert entropy(x - 10 * gradient) < entropy(x)


def every_partition(layers):
    """All ways to cut so many layers into runs of at most three."""
    if layers == 0:
        return [[]]
    return [[size, *rest] for size in range(1, min(3, layers) + 1) for rest in every_partition(layers - size)]


@pytest.mark.parametrize("seed", range(12))
def test_a_partition_is_the_longest_from_the_front_that_equation_7_allows(seed):
    dice = torch.Generator().manual_seed(seed)
    found = torch.rand(7, generator=dice).tolist()
    threshold = torch.rand((), generator=dice).item() if seed % 2 else None
    mean = sum(found) / 7 if threshold is None else threshold

    def allowed(sizes):
        start = 0
        for size in sizes:
            if size > 1 and not sum(found[start : start + size - 1]) > (size - 1) * mean:
                return False
            start += size
        return True

    expected = max(sizes for sizes in every_partition(8) if allowed(sizes))
    blocks = qvlm.partition(found, threshold)
    assert [len(block) for block in blocks] == expected
    assert [layer for block in blocks for layer in block] == list(range(8))


def test_a_low_threshold_joins_three_layers_at_most_and_a_high_one_none():
    assert qvlm.partition([1.0] * 7, 0.0) == [range(0, 3), range(3, 6), range(6, 8)]
    assert qvlm.partition([1.0] * 2, 5.0) == [range(0, 1), range(1, 2), range(2, 3)]
    assert qvlm.partition([]) == [range(0, 1)]


@pytest.mark.parametrize("percentile", qvlm.PERCENTILES)
def test_limits_leave_the_percentile_of_the_values_below_them(percentile):
    rows = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    limits = qvlm.limits_at(rows, percentile)
    beyond = round((1 - percentile) * 1999)
    assert (rows > limits.high).sum() == beyond
    assert (rows < limits.low).sum() == beyond
    if percentile == 1:
        assert limits == Limits(rows.min().item(), rows.max().item())


class Layers(nn.Module):
    """Blocks of one linear each, without a bias."""

    def __init__(self, count, width=6):
        super().__init__()
        torch.manual_seed(count)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))
        for layer in self.layers:
            layer.weight.data = torch.randn(width, width) * 0.7


def blocks_of(model):
    def block(index):
        site = Site(f"layers.{index}", "language", index, "feedforward", 6, 6)
        return Block(site.name, "language", index, (Input((site,), None),))

    return tuple(block(index) for index in range(len(model.layers)))


INPUTS = Grid(3, TENSOR, symmetric=False)


def spanning(count, seed=1):
    """A span at its beginning: weights quantized, calls with targets, roundings, and what the sites read."""
    model = Layers(count)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 30, 6, generator=generator).pow(3)  # long tails, so that clipping pays
    rows, hidden = {}, x
    for index, layer in enumerate(model.layers):
        rows[f"layers.{index}"] = hidden.detach().flatten(0, 1)
        hidden = layer(hidden).detach()
        layer.weight.data = round_trip(layer.weight.data, Grid(4, ROW), torch.float32)
    calls = [
        Call(each, (), {}, reference=Call(end, (), {})) for each, end in zip(x.split(2), hidden.split(2), strict=True)
    ]
    span = blocks_of(model)
    roundings = [
        InputRounding(model, {block.name: INPUTS}, {block.name: qvlm.limits_at(rows[block.name], 1.0)})
        for block in span
    ]
    return model, span, calls, roundings, rows


def output_error(model, calls, limits):
    """In float64, without hooks: the span's squared error, relative token by token."""
    total = 0.0
    for call in calls:
        hidden = call.hidden.double()
        for name, layer in model.layers.named_children():
            found = limits[f"layers.{name}"]
            scale = (max(found.high, 0) - min(found.low, 0)) / 7
            zero = round(-min(found.low, 0) / scale)
            codes = (hidden / scale).round().clamp(-zero, 7 - zero)
            hidden = codes * scale @ layer.weight.double().T
        target = call.reference.hidden.double()
        total += ((hidden - target).norm(dim=-1) / target.norm(dim=-1)).square().sum().item()
    return total


@pytest.mark.parametrize("count", [2, 3])
def test_the_joint_search_is_an_exhaustive_one(count):
    model, span, calls, roundings, rows = spanning(count)
    candidates = [[qvlm.limits_at(rows[name], p) for p in qvlm.PERCENTILES] for name in rows]
    expected = min(
        (dict(zip(rows, combination, strict=True)) for combination in itertools.product(*candidates)),
        key=lambda limits: output_error(model, calls, limits),
    )
    found = crosslayer.search(span, model, calls, roundings, rows)
    assert found == expected
    assert [rounding.limits for rounding in roundings] == [{name: expected[name]} for name in rows]
    assert set(found.values()) != {each[0] for each in candidates}  # clipping pays here


def layer_by_layer(model, span, calls, roundings, rows):
    """Eq. 2: each block alone, behind the quantized ones, against what full precision makes of its own input."""
    found, reference = {}, torch.stack([call.hidden for call in calls])
    running = [call.hidden for call in calls]
    for block, exact, rounding in zip(span, Layers(len(span)).layers, roundings, strict=True):
        reference = exact(reference).detach()
        alone = [
            Call(hidden, (), {}, reference=Call(end, (), {})) for hidden, end in zip(running, reference, strict=True)
        ]
        found |= crosslayer.search((block,), model, alone, [rounding], rows)
        running = [model.layers[block.index](hidden).detach() for hidden in running]
    return found


def test_the_joint_search_is_never_worse_than_layer_by_layer_and_sometimes_better():
    gains = []
    for seed in range(4):
        model, span, calls, roundings, rows = spanning(3, seed)
        joint = crosslayer.search(span, model, calls, roundings, rows)
        alone = layer_by_layer(model, span, calls, roundings, rows)
        gains.append(output_error(model, calls, alone) - output_error(model, calls, joint))
    assert min(gains) >= 0
    assert max(gains) > 0


def test_of_equally_good_percentiles_the_largest_is_taken():
    model, span, calls, roundings, rows = spanning(2)
    for layer in model.layers:
        layer.weight.data.zero_()
    found = crosslayer.search(span, model, calls, roundings, rows)
    assert found == {name: qvlm.limits_at(rows[name], 1.0) for name in rows}


def test_a_site_that_is_not_searched_keeps_its_limits():
    model, span, calls, roundings, rows = spanning(3)
    kept = dict(roundings[1].limits)
    del rows["layers.1"]
    assert set(crosslayer.search(span, model, calls, roundings, rows)) == set(rows)
    assert roundings[1].limits == kept


def test_dependencies_are_the_entropies_between_full_precision_blocks(tiny_folders):
    """The oracle runs the whole stage in memory, in float64, on every element."""
    checkpoint = open_checkpoint(str(tiny_folders["llava-llama"]))
    model, whole = checkpoint.skeleton(), checkpoint.model()
    stage = next(stage for stage in walk(model, checkpoint.family).stages if stage[0].component == "vision")
    x = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0))
    quantized = Call(torch.zeros(2, 17, 64), (None,), {}, reference=Call(x, (None,), {}))
    (found,) = crosslayer.dependencies(stage, model, checkpoint, [quantized], 4)

    outputs, hidden = [], x
    for block in stage:
        hidden = Call(hidden, (None,), {}).run(whole.get_submodule(block.name)).detach()
        outputs.append(hidden.double())
    assigned = []
    for output in outputs:
        levels = torch.linspace(0, 1, 16).double() * (output.max() - output.min()) + output.min()
        distances = (output.reshape(-1, 1) - levels).square() / (levels[1] - levels[0])
        assigned.append(torch.exp(-distances) / torch.exp(-distances).sum(1, keepdim=True))
    joint = assigned[0].T @ assigned[1] / len(assigned[0])
    expected = -(joint * (joint / joint.sum(1, keepdim=True)).log()).sum().item()
    assert found == pytest.approx(expected, rel=0.02)  # drawn elements against all
    assert quantized.hidden.abs().sum() == 0
    assert all(parameter.is_meta for parameter in model.get_submodule(stage[0].name).parameters())


def test_spans_are_runs_of_blocks():
    stage = blocks_of(Layers(4))
    assert crosslayer.spans(stage, [1.0, 0.0, 1.0], 0.6) == [stage[:2], stage[2:]]


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(4, ROW, False), Grid(3, TENSOR), Grid(8, TENSOR, False)], ids=str)
def test_a_learned_linear_rounds_as_the_kernel_does(grid):
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 8), torch.randn(200, 32)
    limits = Limits(-1.25, 1.5)
    clip = torch.full((8, 2 if grid.group == 16 else 1), 0.75)
    scheme = Scheme("qvlm", grid, grid)
    learned = LearnedLinear(linear, scheme, torch.float16, limits, [clip])
    expected = nn.functional.linear(
        round_input(x, grid, limits), round_trip(linear.weight, grid, torch.float16, clip), linear.bias
    )
    assert learned.limits == limits
    assert torch.equal(learned.clip, clip)
    assert torch.equal(learned(x), expected)


def test_rounding_learns_its_limits_from_what_lies_beyond_them():
    """Of a value beyond the range the gradient is that of the limit; of one within, only through the scale."""
    low, high = torch.tensor([-1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    round_between(torch.tensor([[5.0]]), low, high, Grid(8, TENSOR, False), torch.float32).sum().backward()
    assert high.grad.item() == pytest.approx(1, abs=0.01)
    assert low.grad.item() == pytest.approx(0, abs=0.01)


@pytest.fixture(scope="module")
def calibration(tiny_folders, random_samples):
    checkpoint = open_checkpoint(str(tiny_folders["llava-llama"]))
    batches = prepare(random_samples, open_processor(checkpoint.folder), checkpoint.family)
    sites = walk(checkpoint.skeleton(), checkpoint.family).sites
    return checkpoint, batches, {site.name: Scheme("qvlm", Grid(3, ROW), Grid(4, ROW)) for site in sites}


def tuned_on(calibration, monkeypatch, learn):
    losses = []
    monkeypatch.setattr(vision_tuning, "learn", lambda *given: losses.extend(learn(*given)))
    monkeypatch.setattr(vision_tuning, "EPOCHS", 6)
    return vision_tuning.tune(*calibration, solved(*calibration)), losses


def solved(checkpoint, batches, schemes):
    """What the vision sites are solved to without tuning."""
    model = checkpoint.skeleton()
    plan = walk(model, checkpoint.family)
    untuned = {name: replace(scheme, options=Options(vision_tuning=False)) for name, scheme in schemes.items()}
    found = quantize(checkpoint, model, plan, Assignment(untuned, {}), Calibration(model, batches, True))
    return {
        name: replace(site, scheme=schemes[name])
        for block in found
        if block.block.component == "vision"
        for name, site in block.sites.items()
    }


def test_tuning_lowers_the_loss_of_what_it_learns_from_and_gives_the_same_bits_twice(calibration, monkeypatch):
    vision_learn = vision_tuning.learn

    def learn(linears, batches, tests, loss):
        return vision_learn(linears, batches, [target for batch in batches for target in batch], loss)

    first, losses = tuned_on(calibration, monkeypatch, learn)
    second, _ = tuned_on(calibration, monkeypatch, learn)
    assert min(losses[1:]) < losses[0]
    assert set(first) == {name for name in calibration[2] if ".vision_tower." in name}
    for name, tuned in first.items():
        assert tuned.limits == second[name].limits
        assert torch.equal(tuned.clip, second[name].clip)
        assert tuned.clip.shape == (128 if name.endswith("fc1") else 64, 1)


def parameters_of(linears):
    return [parameter.detach().clone() for linear in linears for parameter in (linear.factors, *linear.clips)]


def test_tuning_that_only_does_harm_leaves_what_it_began_with(calibration, monkeypatch):
    kept = []
    vision_learn = vision_tuning.learn

    def learn(linears, batches, tests, loss):
        kept.append(parameters_of(linears))

        def total(target):  # learning lowers what the test wants high
            drawn_in = sum(parameter.sum() for linear in linears for parameter in (linear.factors, *linear.clips))
            return drawn_in if torch.is_grad_enabled() else -drawn_in

        losses = vision_learn(linears, batches, tests, total)
        kept.append(parameters_of(linears))
        return losses

    _, losses = tuned_on(calibration, monkeypatch, learn)
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]
    assert all(torch.equal(before, after) for before, after in zip(*kept, strict=True))


@pytest.mark.parametrize("inputs", [Grid(4, TENSOR), Grid(8, 32), None], ids=str)
def test_only_rows_that_are_rounded_have_a_clip_to_learn(tiny_folders, random_samples, monkeypatch, inputs):
    monkeypatch.setattr(vision_tuning, "EPOCHS", 1)
    checkpoint = open_checkpoint(str(tiny_folders["blip2-opt"]))
    batches = prepare(random_samples[:3], open_processor(checkpoint.folder), checkpoint.family)
    v_only = {
        site.name: Scheme("qvlm", Grid(3, TENSOR), inputs, (site.part_rows("v"),) if site.parts else None)
        for site in walk(checkpoint.skeleton(), checkpoint.family).sites
    }
    found = vision_tuning.tune(checkpoint, batches, v_only, solved(checkpoint, batches, v_only))
    assert set(found) == {name for name in v_only if name.startswith("vision_model.")}
    for name, tuned in found.items():
        assert (tuned.limits is None) == (inputs is None)
        if name.endswith("qkv"):
            assert torch.equal(tuned.clip[:128], torch.ones(128, 1))
            assert (tuned.clip[128:] < 1).all()
        assert len(tuned.clip[-64:].unique()) == 1  # one scale for the whole tensor, so one factor


def test_pairs_to_learn_from_are_not_tested_on():
    batches = [{"input_ids": torch.full((16, 5 + i), i), "pixel_values": torch.arange(16.0) + 16 * i} for i in range(8)]
    learning, held_out = vision_tuning.split(batches)

    def numbers(found):
        return [number for batch in found for inputs in batch for number in inputs["pixel_values"].tolist()]

    assert len(set(numbers(learning))) == 64
    assert len(set(numbers(held_out))) == 32
    assert not set(numbers(learning)) & set(numbers(held_out))
    assert all(sum(len(inputs["input_ids"]) for inputs in batch) == 8 for batch in learning)
    assert numbers(learning) == numbers(vision_tuning.split(batches)[0])


def test_text_alone_tunes_nothing(calibration):
    checkpoint, batches, schemes = calibration
    text = [{key: value for key, value in batch.items() if key != "pixel_values"} for batch in batches]
    assert vision_tuning.tune(checkpoint, text, schemes, solved(*calibration)) == {}
