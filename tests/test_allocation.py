import itertools
import json

import numpy as np
import pytest
import tiny
import torch
import yaml
from elsewhere import DEVICES

from vlmq.exporter.calibration import prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.runtime import open_processor
from vlmq.exporter.search import budget, knapsack, quadratic
from vlmq.exporter.search.allocate import _candidates
from vlmq.exporter.search.fisher import answered, divergence, effects, log_probabilities, together
from vlmq.exporter.search.grid import Configuration
from vlmq.exporter.search.pieces import plan
from vlmq.exporter.search.refine import Factor
from vlmq.exporter.search.rules import with_rules
from vlmq.exporter.search.sensitivity import Choice, items
from vlmq.exporter.simulate import simulate_batches
from vlmq.exporter.walk import walk
from vlmq.formats import manifest
from vlmq.kernels.grid import Grid, round_trip

BASE = {"method": "awq", "group_size": 32}


def instance(seed, items, choices, alike=False):
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(items):
        size = np.arange(1, choices + 1) * 10 if alike else generator.integers(1, 60, choices)
        made.append(knapsack.Choices(size.astype(np.int64), generator.uniform(0, 1, choices)))
    return made


def by_force(items, allowed):
    """Of all combinations the cheapest that fits."""
    best = None
    for chosen in itertools.product(*(range(len(item.bytes)) for item in items)):
        size = sum(int(item.bytes[place]) for item, place in zip(items, chosen, strict=True))
        cost = sum(float(item.cost[place]) for item, place in zip(items, chosen, strict=True))
        if size <= allowed and (best is None or cost < best):
            best = cost
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_the_best_of_all_combinations(seed):
    made = instance(seed, items=5, choices=4, alike=seed % 2 == 0)
    least = sum(int(item.bytes.min()) for item in made)
    most = sum(int(item.bytes.max()) for item in made)
    for allowed in (least - 1, least, (2 * least + most) // 3, (least + 2 * most) // 3, most):
        found, expected = knapsack.solve(made, allowed), by_force(made, allowed)
        if expected is None:
            assert found is None
            continue
        assert found.exact
        assert found.cost == pytest.approx(expected)
        pairs = list(zip(made, found.chosen, strict=True))
        assert sum(int(item.bytes[place]) for item, place in pairs) == found.bytes <= allowed
        assert sum(float(item.cost[place]) for item, place in pairs) == pytest.approx(found.cost)


def test_a_knapsack_of_too_many_sums_stays_within_the_budget_and_says_so():
    made = instance(0, items=6, choices=5)
    least = sum(int(item.bytes.min()) for item in made)
    exact = knapsack.solve(made, least + 60)
    for limit in (3, 5):
        found = knapsack.solve(made, least + 60, limit)
        assert not found.exact
        assert found.bytes <= least + 60
        assert found.cost >= exact.cost
    assert knapsack.solve(made, least, limit=3).bytes == least


def effects_of(seed, items, choices):
    """Of 40 draws: some of it is common to all items, and the last choice of each does nothing."""
    generator = np.random.default_rng(seed)
    made = generator.normal(size=(40, items, choices)) + generator.normal(size=(40, 1, 1))
    made[:, :, -1] = 0
    return made, np.sort(generator.integers(1, 60, (items, choices)), 1)


def half_the_mean_square(made, chosen):
    return 0.5 * np.square(sum(made[:, item, place] for item, place in enumerate(chosen))).mean()


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_for_one_item_or_for_two_is_better(seed):
    made, sizes = effects_of(seed, items=5, choices=3)
    allowed = (sizes.min(1).sum() + sizes.max(1).sum()) // 2
    found = quadratic.solve(quadratic.products(made), sizes, allowed)

    def size(chosen):
        return sum(sizes[item, place] for item, place in enumerate(chosen))

    cost = half_the_mean_square(made, found)
    assert quadratic.cost(quadratic.products(made), found) == pytest.approx(cost)
    assert size(found) <= allowed
    others = [one for one in itertools.product(range(3), repeat=5) if size(one) <= allowed]
    near = [one for one in others if sum(mine != theirs for mine, theirs in zip(one, found, strict=True)) <= 2]
    assert len(near) > 1
    assert cost <= min(half_the_mean_square(made, one) for one in near) * (1 + 1e-9)
    assert cost <= 1.2 * min(half_the_mean_square(made, one) for one in others)


def test_choices_whose_effects_cancel_are_found_where_each_alone_is_bad():
    made = np.zeros((2, 3, 2))
    made[:, 0, 0], made[:, 1, 0], made[:, 2, 0] = (4, -4), (-4, 4), (1, 1)
    sizes = np.array([[1, 2]] * 3)
    costs = quadratic.products(made)
    assert quadratic.solve(costs, sizes, 4) == (0, 0, 1)  # a knapsack, of each one's own, has no way there
    assert quadratic.cost(costs, (0, 0, 1)) == 0
    with pytest.raises(ValueError, match="nothing fits 2 bytes"):
        quadratic.solve(costs, sizes, 2)


def test_loosened_effects_are_those_of_a_common_part_and_of_another_in_which_items_share_nothing():
    made, _ = effects_of(0, items=4, choices=3)
    chosen = (0, 1, 0, 1)
    own = 0.5 * sum(np.square(made[:, item, place]).mean() for item, place in enumerate(chosen))
    expected = 0.3 * half_the_mean_square(made, chosen) + 0.7 * own
    found = quadratic.loosened(quadratic.products(made), 0.3)
    assert quadratic.cost(found, chosen) == pytest.approx(expected)
    assert quadratic.cost(quadratic.products(made), chosen) == pytest.approx(half_the_mean_square(made, chosen))


def test_among_candidates_are_the_same_for_all_and_the_best_a_width_away_from_it():
    made, _ = effects_of(1, items=4, choices=6)
    made *= 4.0 ** -np.arange(6)  # each width errs a quarter as much as the one before
    made[:, 0] *= 100  # so that it is given the most by far, where it may be
    sizes = np.array([[2, 3, 4, 5, 6, 16]] * 4)
    costs = [quadratic.products(made)]
    found = _candidates(costs, sizes, 4 * 4 + 1, [2, 3, 4, 5, 6, 16])
    best, near, same = found
    assert best[0] > 3
    assert same == (2, 2, 2, 2)
    assert near[0] == 3
    assert set(near) <= {1, 2, 3}
    assert all(sizes[range(4), each].sum() <= 17 for each in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4bpw", 400),  # 800 linears of 4 bits
        (" 3.8 bpw ", 380),
        ("50%", 700 - 200),  # of all, less what is no linear
        ("1kB", 1000 - 200),
        ("2KiB", 2048 - 200),
        ("900", 900 - 200),
    ],
)
def test_a_budget_is_bytes_of_the_linears(text, expected):
    assert budget.in_bytes(text, weights=1400, linears=800, elsewhere=200) == expected


@pytest.mark.parametrize("text", ["", "much", "4 bits", "4bpw%", "..bpw", "0bpw", "0%", "-3bpw"])
def test_what_is_no_budget_gets_one_line(text):
    with pytest.raises(VlmqError, match=r"write one like 3\.8bpw, 40% or 2GiB"):
        budget.in_bytes(text, 1400, 800, 200)


def test_factors_change_by_equal_ratios_between_the_widths_that_were_measured():
    factor = Factor({2: 0.25, 4: 4.0})
    assert [factor.at(bits) for bits in (2, 3, 4, 5, 16)] == pytest.approx([0.25, 1.0, 4.0, 4.0, 4.0])


@pytest.fixture
def of(tiny_folders):
    def opened(variant):
        checkpoint = open_checkpoint(str(tiny_folders[variant]))
        return checkpoint, walk(checkpoint.skeleton(), checkpoint.family)

    return opened


@pytest.mark.parametrize("variant", ["blip2-opt", "llava-qwen2"])
@pytest.mark.parametrize("seed", range(3))
def test_rules_say_the_choice_of_every_linear(of, variant, seed):
    _, found = of(variant)
    generator = np.random.default_rng(seed)
    base = make_recipe({**BASE, "rules": [{"match": "fc1", "bits": 8}]})
    choices = [Choice(bits, group) for bits in (2, 3, 16) for group in (16, 32)]
    chosen = {}
    for site in found.sites:
        if generator.random() < 0.9:  # the others stay as they are
            chosen[site.name] = choices[generator.integers(len(choices))]
    assigned = with_rules(base, found, chosen).assign(found).schemes
    for site in found.sites:
        choice = chosen.get(site.name, Choice(16))
        if choice.bits == 16:
            assert site.name not in assigned
        else:
            assert (assigned[site.name].grid.bits, assigned[site.name].grid.group) == (choice.bits, choice.group)


def test_rules_are_few_where_linears_agree(of):
    _, found = of("llava-llama")
    chosen = {
        site.name: Choice(8 if ".mlp." in site.name and site.component == "language" else 3) for site in found.sites
    }
    rules = with_rules(make_recipe(BASE), found, chosen).rules
    assert len(rules) <= 5  # three components, and what differs in one of them
    assigned = with_rules(make_recipe(BASE), found, chosen).assign(found).schemes
    assert {name: scheme.grid.bits for name, scheme in assigned.items()} == {
        name: choice.bits for name, choice in chosen.items()
    }


@pytest.fixture
def chosen_for(random_samples, tmp_path_factory):
    """The items of a checkpoint at some bits, and its model."""

    def found(checkpoint, plain, recipe, bits, device="cpu"):
        choices = {
            Choice(width): with_rules(recipe, plain, {site.name: Choice(width) for site in plain.sites}).assign(plain)
            for width in bits
        }
        batches = prepare(random_samples, open_processor(checkpoint.folder), checkpoint.family)
        model = checkpoint.model().to(device)
        folder = tmp_path_factory.mktemp("changes")
        return items(checkpoint, model, plain, choices, batches, folder), model, batches

    return found


@pytest.mark.parametrize("variant", ["llava-llama", "blip2-opt", "blip2-t5"])
def test_half_the_mean_square_effect_is_the_divergence_of_small_errors_together(
    of, chosen_for, random_samples, variant
):
    """Of linears all over the model at once, whose errors partly cancel; the oracle is the model itself, in float64."""
    checkpoint, plain = of(variant)
    found, model, _ = chosen_for(checkpoint, plain, make_recipe({**BASE, "method": "rtn"}), (2, 3))
    asked = list(answered(random_samples[:3], open_processor(checkpoint.folder), checkpoint))
    told = effects(model, found, asked, draws=300)
    assert told.shape == (900, len(found), 2)
    model.double()
    asked = [
        ({name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}, answer)
        for inputs, answer in asked
    ]
    reference = log_probabilities(model, asked)
    small = 1e-3
    for place in (0, 1):
        for item in found:
            for site, changed in item.changes():
                model.get_parameter(f"{site}.weight").data += small * changed[place].double()
        measured = divergence(reference, log_probabilities(model, asked)) / small**2
        for item in found:
            for site, changed in item.changes():
                model.get_parameter(f"{site}.weight").data -= small * changed[place].double()
        together_ = 0.5 * float(told[:, :, place].double().sum(1).square().mean())
        apart = 0.5 * float(told[:, :, place].double().square().sum(1).mean())
        assert together_ == pytest.approx(measured, rel=0.2)
        assert abs(apart - measured) > abs(together_ - measured)


@pytest.mark.parametrize("elsewhere", DEVICES)
@pytest.mark.parametrize("variant", ["llava-llama", "blip2-opt"])
def test_effects_that_are_found_on_another_device_are_those_found_here(
    of, chosen_for, random_samples, variant, elsewhere
):
    checkpoint, plain = of(variant)
    recipe = make_recipe({**BASE, "method": "rtn"})
    asked = together(answered(random_samples[:4], open_processor(checkpoint.folder), checkpoint), 2)

    def found(device):
        made, model, _ = chosen_for(checkpoint, plain, recipe, (2, 3), device)
        return effects(model, made, asked), log_probabilities(model, asked)

    (mine, expected), here = found("cpu"), torch.device("cpu")
    with elsewhere() as device:
        theirs, told = found(device)
    assert theirs.device == here
    assert {each.device for each in told} == {here}
    assert mine.abs().max() > 0.01
    torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-4 * mine.abs().max().item())
    torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-4)


def test_samples_together_say_what_each_says_alone(of, random_samples):
    checkpoint, _ = of("llava-llama")
    model = checkpoint.model()
    alone = list(answered(random_samples, open_processor(checkpoint.folder), checkpoint))
    batches = together(alone, 4)
    assert sum(len(inputs["input_ids"]) for inputs, _ in batches) == len(alone)
    assert max(len(inputs["input_ids"]) for inputs, _ in batches) == 4
    before, after = (log_probabilities(model, asked) for asked in (alone, batches))
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(1.5)
    other = [log_probabilities(model, asked) for asked in (alone, batches)]
    assert divergence(after, other[1]) == pytest.approx(divergence(before, other[0]), rel=1e-4)


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_an_item_is_what_shares_an_input_and_knows_what_each_choice_changes(of, chosen_for, method):
    checkpoint, plain = of("blip2-opt")
    recipe = make_recipe({**BASE, "method": method})
    before = {name: parameter.clone() for name, parameter in checkpoint.model().named_parameters()}
    made, model, batches = chosen_for(checkpoint, plain, recipe, (2, 8))
    assert [item.sites for item in made] == [
        tuple(site.name for site in entry.sites) for block in plain.blocks for entry in block.inputs
    ]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    name = "vision_model.encoder.layers.1.mlp.fc2"  # nothing can be folded before it, so all methods round its weight
    item = next(item for item in made if item.sites == (name,))
    weight = model.get_parameter(f"{name}.weight")
    ((site, (two, eight)),) = item.changes()
    assert site == name
    if method == "rtn":
        torch.testing.assert_close(two, round_trip(weight, Grid(2, 32)) - weight, rtol=1e-2, atol=1e-6)
    rows = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    x = torch.cat(rows)
    nearest = x @ (round_trip(weight, Grid(2, 32)) - weight).T
    assert (x @ eight.T).norm() < 0.1 * (x @ two.T).norm()
    assert (x @ two.T).norm() <= 1.01 * nearest.norm()  # a method looks at the input, so it does no worse there
    assert item.bytes[Choice(16)] == 2 * weight.numel()
    assert item.bytes[Choice(2)] >= weight.numel() // 4


@pytest.fixture
def asked(random_samples, tmp_path_factory):
    file = tmp_path_factory.mktemp("allocation") / "seen.jsonl"
    lines = [{"image": str(sample.image), "question": sample.text, "answer": "red"} for sample in random_samples[:6]]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def flags(asked, *more):
    return ("--calibration", asked, "--samples", 6, "--group-size", 32, *more)


def test_an_allocated_recipe_exports_to_the_bytes_it_says(vlmq, tiny_folders, asked, tmp_path):
    model = tiny_folders["blip2-opt"]
    code, out, err = vlmq(
        "allocate", model, *flags(asked), "--budget", "4.6bpw", "-o", tmp_path / "found.yaml", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert yaml.safe_load((tmp_path / "found.yaml").read_text()) == found["recipe"]
    assert found["bits_per_weight"] <= 4.6
    assert found["bits_per_weight"] > 4.3  # what it was given is used
    code, _, err = vlmq(
        "export", model, "--recipe", tmp_path / "found.yaml", "--calibration", asked, "--samples", 6,
        "--format", "safetensors", "--no-verify", "-o", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    file = tmp_path / "out" / "model.safetensors"
    assert file.stat().st_size - int.from_bytes(file.read_bytes()[:8], "little") - 8 == found["bytes"]
    quantized = manifest.sizes(manifest.read(tmp_path / "out")).linears
    assert quantized <= found["linears"] < found["bytes"]


def test_allocated_bits_leave_what_is_hardly_heard_and_beat_uniform_ones_of_as_many_bytes(
    vlmq, asked, random_samples, tmp_path
):
    """On the samples that they are allocated on; `benchmarks/sweep.py` asks others."""
    folder = tmp_path / "quiet"
    model = tiny.tiny("llava-llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" in name and name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.mul_(0.01)  # and so are the errors of all linears of its block
    model.half().save_pretrained(folder)
    tiny.processor("llava-llama").save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    found = walk(checkpoint.skeleton(), checkpoint.family)
    uniform = {**BASE, "method": "rtn", "bits": 4}
    allowed = plan(Configuration("uniform", "uniform", uniform), checkpoint, checkpoint.skeleton(), found).bytes
    code, out, err = vlmq("allocate", folder, *flags(asked, "--method", "rtn"), "--budget", allowed, "--json")
    assert code == 0, err
    said = json.loads(out)
    asks = list(answered(random_samples[:6], open_processor(folder), checkpoint))
    reference = log_probabilities(checkpoint.model(), asks)

    def measured(recipe):
        model, _ = simulate_batches(checkpoint, make_recipe(recipe), [])
        return divergence(reference, log_probabilities(model, asks))

    assert said["bytes"] <= allowed
    assert said["bits"]["vision"] < 3
    assert said["bits"]["language"] > 4
    assert measured(said["recipe"]) == pytest.approx(said["measured"], rel=1e-3)
    assert measured(said["recipe"]) < measured(uniform)


def test_what_a_recipe_leaves_alone_stays_alone_and_graphs_get_bits_they_hold(vlmq, tiny_folders, asked):
    model = tiny_folders["blip2-opt"]
    code, out, err = vlmq(
        "allocate",
        model,
        *flags(asked, "--method", "rtn", "--vision-bits", 16),
        "--budget",
        "60%",
        "--format",
        "onnx",
        "--json",
    )
    assert code == 0, err
    checkpoint = open_checkpoint(str(model))
    found = walk(checkpoint.skeleton(), checkpoint.family)
    schemes = make_recipe(json.loads(out)["recipe"]).assign(found).schemes
    assert schemes
    for site in found.sites:
        if site.component == "vision":
            assert site.name not in schemes
        elif site.name in schemes:
            assert schemes[site.name].grid.bits in (2, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget", "1.5bpw"), "--budget 1.5bpw: below what is possible; with the fewest bits the linears have 2."),
        (("--budget", "1kB"), "below what is possible"),
        (("--budget", "17bpw"), "has room for every linear at 16 bits; give less"),
        (("--budget", "lots"), "--budget lots: not a budget; write one like 3.8bpw, 40% or 2GiB"),
        (("--bits", "16"), "left at 16 bits"),
        (("--qkv", "v-only"), "v-only stores fused projections dense"),
        (("--groups", "33"), "--groups: group_size: a group of 33 columns"),
        (("--task", "chess"), "--task chess: unknown"),
        (("--device", "tpu"), "--device tpu: unknown; choose auto, cpu, cuda or cuda:1"),
    ],
)
def test_what_cannot_be_allocated_gets_one_line_and_nothing_is_written(
    vlmq, tiny_folders, asked, tmp_path, arguments, words
):
    output = tmp_path / "found.yaml"
    code, out, err = vlmq(
        "allocate", tiny_folders["blip2-opt"], *flags(asked, "--method", "rtn"), *arguments, "-o", output
    )
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert not output.exists()
