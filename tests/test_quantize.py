import pytest
import tiny
import torch
from elsewhere import DEVICES
from transformers import AutoModelForImageTextToText

from vlmq.exporter import ends, folds
from vlmq.exporter.calibration import Calibration, prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.devices import CPU
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.quantize import needs_reference, quantize
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.rounding import InputRounding
from vlmq.exporter.samples import Sample
from vlmq.exporter.solving import solve_block
from vlmq.exporter.sums import Sums
from vlmq.exporter.walk import walk
from vlmq.kernels.grid import Grid, Limits, QuantizedWeight, to_grid

PER_TOKEN = {"bits": 8, "group_size": "token"}
PER_TENSOR = {"bits": 8, "group_size": "tensor"}
RECIPES = {
    "uniform": {"method": "uniform", "bits": 8},
    "rtn": {"method": "rtn"},
    "rtn per tensor": {"method": "rtn", "bits": 8, "group_size": "tensor", "activations": PER_TENSOR},
    "awq": {"method": "awq"},
    "awq by block": {"method": "awq", "options": {"awq_loss": "block"}},
    "gptq": {"method": "gptq"},
    "gptaq": {"method": "gptq", "options": {"gptaq": True}},
    "awq+gptq": {"method": "awq+gptq"},
    "smoothquant": {"method": "smoothquant", "bits": 8, "activations": PER_TOKEN},
    "awq+smoothquant": {"method": "awq+smoothquant", "activations": {"bits": 4, "group_size": 32}},
    "qvlm": {"method": "qvlm", "activations": PER_TENSOR, "options": {"vision_tuning": False}},
    "weighted": {"method": "gptq", "options": {"token_weights": "modality"}},
    "biases": {"method": "uniform", "bits": 8, "options": {"biases": True}},
}
WEIGHT_ONLY = ("rtn", "awq", "gptq")


def run(folder, variant, samples, watch=lambda model: None, device=CPU, dtype=torch.float32, **recipe):
    """Quantize a tiny checkpoint: what came out, and the calibration with what every stage put out."""
    checkpoint = open_checkpoint(str(folder))
    model = checkpoint.skeleton()
    found = walk(model, checkpoint.family)
    group = {} if recipe.get("method") == "uniform" else {"group_size": 32}  # uniform has a grid of its own
    assignment = make_recipe({**group, **recipe}).assign(found)
    calibration = None
    if samples:
        batches = prepare(samples, tiny.processor(variant), checkpoint.family)
        calibration = Calibration(model, batches, needs_reference(assignment), dtype=dtype)
    blocks = []
    for block in quantize(checkpoint, model, found, assignment, calibration, device=device):
        watch(model)
        blocks.append(block)
    return blocks, calibration


def sites(blocks):
    return {name: solved for block in blocks for name, solved in block.sites.items()}


def fake_quantized(folder, blocks):
    """The whole model with the solved weights in place, loaded by transformers."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for block in blocks:
            for name, solved in block.sites.items():
                weight = solved.weight
                dense = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()
                model.get_submodule(name).weight.copy_(dense)
            for name, tensor in block.changed.items():
                model.get_parameter(name).copy_(tensor)
    solved = sites(blocks)
    grids = {name: found.scheme.inputs for name, found in solved.items() if found.scheme.inputs}
    InputRounding(model, grids, {name: solved[name].limits for name in grids})
    return model


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("variant", ["blip2-opt", "llava-llama", "blip2-t5"])
def test_blocks_that_run_in_bfloat16_on_the_samples_get_about_the_weights_that_float32_gives(
    tiny_folders, random_samples, variant, method
):
    """What they put out is float32 all the same, so errors do not pile up in what blocks hand on."""
    exact, _ = run(tiny_folders[variant], variant, random_samples, **RECIPES[method])
    half, calibration = run(tiny_folders[variant], variant, random_samples, dtype=torch.bfloat16, **RECIPES[method])
    assert all(place.read().dtype == torch.float32 for _, kept in calibration.played for place in kept.values())
    before, after = sites(exact), sites(half)
    assert any(not torch.equal(before[name].weight.codes, after[name].weight.codes) for name in before)
    losses = [sum(solved.loss for solved in found.values()) for found in (before, after)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_every_block_saw_what_the_whole_quantized_model_gives_it(recipe, variant, tiny_folders, random_samples):
    blocks, calibration = run(tiny_folders[variant], variant, random_samples, **RECIPES[recipe])
    model = fake_quantized(tiny_folders[variant], blocks)
    caught = {}
    for stage, _ in calibration.played:
        model.get_submodule(stage[-1].name).register_forward_hook(
            lambda module, args, output, name=stage[-1].name: caught.__setitem__(
                name, output[0] if isinstance(output, tuple) else output
            )
        )
    for index, batch in enumerate(calibration.batches):
        model(**batch)
        for stage, outputs in calibration.played:
            torch.testing.assert_close(outputs[index].read(), caught[stage[-1].name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("elsewhere", DEVICES)
@pytest.mark.parametrize("variant", ["blip2-opt", "llava-llama"])
@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_blocks_that_are_solved_on_another_device_come_back_as_those_solved_here(
    recipe, variant, elsewhere, tiny_folders, random_samples
):
    """Alike but for the last bits of products: these may decide between candidates that err by as much."""
    here, _ = run(tiny_folders[variant], variant, random_samples, **RECIPES[recipe])
    with elsewhere() as device:
        there, _ = run(tiny_folders[variant], variant, random_samples, device=device, **RECIPES[recipe])
    found, back = sites(here), sites(there)
    assert found.keys() == back.keys()
    for name, solved in found.items():
        weight, fold = back[name].weight, back[name].fold
        tensors = (weight.codes, weight.scale, weight.zero, *([] if fold is None else [fold]))
        assert all(type(tensor) is torch.Tensor and tensor.device == CPU for tensor in tensors)
        assert 0.4 < back[name].loss / solved.loss < 2.5
        if solved.scheme.method in ("uniform", "rtn"):  # which look at no input
            assert torch.equal(weight.codes, solved.weight.codes)
    for one, other in zip(here, there, strict=True):
        assert one.changed.keys() == other.changed.keys()
        assert all(type(tensor) is torch.Tensor and tensor.device == CPU for tensor in other.changed.values())


def test_awq_leaves_a_smaller_error_than_rtn_at_every_component(variant, tiny_folders, random_samples):
    losses = {}
    for method in ("rtn", "awq"):
        blocks, _ = run(tiny_folders[variant], variant, random_samples, method=method, bits=3)
        for block in blocks:
            for solved in block.sites.values():
                losses.setdefault((block.block.component, method), []).append(solved.loss)
    for component in ("vision", "connector", "language"):
        assert sum(losses[component, "awq"]) < sum(losses[component, "rtn"])


PER_TENSOR_WEIGHTS = ("uniform", "biases", "rtn per tensor")  # whose parts have ranges of their own


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in PER_TENSOR_WEIGHTS])
@pytest.mark.parametrize("group", [32, -1])
def test_quantizing_a_fused_qkv_equals_quantizing_its_parts(recipe, group, tiny_folders, random_samples):
    folder = tiny_folders["blip2-opt"]
    fused, split = (
        sites(run(folder, "blip2-opt", random_samples, **{**RECIPES[recipe], "group_size": group, "qkv": qkv})[0])
        for qkv in ("fused", "split")
    )
    assert fused.keys() == split.keys()
    for name, solved in fused.items():
        assert torch.equal(solved.weight.codes, split[name].weight.codes)
        assert torch.equal(solved.weight.scale, split[name].weight.scale)


def test_v_only_leaves_the_rows_of_q_and_k_as_they_were(tiny_folders, random_samples):
    blocks, _ = run(tiny_folders["blip2-opt"], "blip2-opt", random_samples, method="rtn", qkv="v-only")
    before = tiny.tiny("blip2-opt").half()
    name = "vision_model.encoder.layers.0.self_attn.qkv"
    solved = sites(blocks)[name]
    weight = before.get_submodule(name).weight
    assert torch.equal(solved.weight[:128], weight[:128])
    expected = to_grid(weight[128:].float(), solved.scheme.grid).dequantize().half()
    assert torch.equal(solved.weight[128:], expected)


def test_rounding_to_nearest_needs_no_samples_and_gives_the_same_without(tiny_folders, random_samples):
    folder = tiny_folders["llava-llama"]
    with_samples, without = (
        sites(run(folder, "llava-llama", samples, method="rtn")[0]) for samples in (random_samples, None)
    )
    for name, solved in with_samples.items():
        assert torch.equal(solved.weight.codes, without[name].weight.codes)


def test_a_linear_left_alone_beside_folded_ones_still_takes_their_scale(tiny_folders, random_samples):
    name = "model.language_model.layers.0.self_attn.k_proj"
    rule = {"match": name, "bits": 16}
    blocks, _ = run(tiny_folders["llava-llama"], "llava-llama", random_samples, rules=[rule])
    block = next(block for block in blocks if block.block.name == "model.language_model.layers.0")
    assert name not in block.sites
    q = block.sites[name.replace("k_proj", "q_proj")]
    assert q.fold is not None
    assert f"{name}.weight" in block.changed
    assert block.changed[f"{name}.weight"].dtype == torch.float16


def test_one_block_at_most_is_in_memory(variant, tiny_folders, random_samples, monkeypatch):
    """Promise 7, while every block is solved: no other weights are anywhere but on the meta device."""
    seen = []

    def watched(block, given, calls):
        filled = [name for name, parameter in given.model.named_parameters() if not parameter.is_meta]
        seen.append(bool(filled) and all(name.startswith(f"{block.name}.") for name in filled))
        return solve_block(block, given, calls)

    monkeypatch.setattr("vlmq.exporter.quantize.solve_block", watched)
    run(tiny_folders[variant], variant, random_samples)
    assert seen
    assert all(seen)


def test_the_same_input_gives_the_same_codes(tiny_folders, random_samples):
    once, again = (sites(run(tiny_folders["llava-qwen2"], "llava-qwen2", random_samples)[0]) for _ in range(2))
    for name, solved in once.items():
        assert torch.equal(solved.weight.codes, again[name].weight.codes)
        assert torch.equal(solved.weight.scale, again[name].weight.scale)


def test_text_alone_calibrates_the_language_model_and_nothing_before_it(tiny_folders):
    text = tuple(Sample(str(number), None, "question", "what is the colour?") for number in range(4))
    kept = {"vision": {"bits": 16}, "connector": {"bits": 16}}
    blocks, _ = run(tiny_folders["llava-llama"], "llava-llama", text, components=kept)
    assert {block.block.component for block in blocks if block.sites} == {"language"}
    with pytest.raises(
        VlmqError, match="no sample has an image, and the vision sees nothing else; pass --vision-bits 16"
    ):
        run(tiny_folders["llava-llama"], "llava-llama", text)
    with pytest.raises(VlmqError, match="blip-2 reads no prompt without an image"):
        run(tiny_folders["blip2-opt"], "blip2-opt", text, components=kept)


def test_a_fold_that_changes_a_block_stops_the_export_and_names_it(tiny_folders, random_samples, monkeypatch):
    """Promise 2, held where it counts: a fold that forgets what makes the input."""

    def forgetful(entry, scale, model):
        for site in entry.sites:
            model.get_submodule(site.name).weight *= scale

    monkeypatch.setattr(folds, "fold", forgetful)
    with pytest.raises(VlmqError, match=r"vision_model\.encoder\.layers\.0: folding changed its output"):
        run(tiny_folders["blip2-opt"], "blip2-opt", random_samples)


@torch.no_grad()
def test_the_reference_runs_alongside_on_what_the_full_precision_model_computes(variant, tiny_folders, random_samples):
    _, calibration = run(tiny_folders[variant], variant, random_samples, bits=2, **RECIPES["gptaq"])
    model = AutoModelForImageTextToText.from_pretrained(tiny_folders[variant], dtype=torch.float32)
    caught = {}
    for stage, _ in calibration.reference_played:
        model.get_submodule(stage[-1].name).register_forward_hook(
            lambda module, args, output, name=stage[-1].name: caught.__setitem__(
                name, output[0] if isinstance(output, tuple) else output
            )
        )
    for index, batch in enumerate(calibration.batches):
        model(**batch)
        for (stage, outputs), (_, quantized) in zip(calibration.reference_played, calibration.played, strict=True):
            torch.testing.assert_close(outputs[index].read(), caught[stage[-1].name], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(quantized[index].read(), outputs[index].read(), rtol=1e-2, atol=1e-2)


def test_a_range_for_a_whole_input_is_what_calibration_saw_there(tiny_folders, random_samples):
    blocks, _ = run(tiny_folders["llava-llama"], "llava-llama", random_samples, **RECIPES["rtn per tensor"])
    name = "model.vision_tower.encoder.layers.0.mlp.fc1"
    model = AutoModelForImageTextToText.from_pretrained(tiny_folders["llava-llama"], dtype=torch.float32)
    seen = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    checkpoint = open_checkpoint(str(tiny_folders["llava-llama"]))
    with torch.no_grad():
        for batch in prepare(random_samples, tiny.processor("llava-llama"), checkpoint.family):
            model(**batch)
    extremes = Limits(min(x.min().item() for x in seen), max(x.max().item() for x in seen))
    found = sites(blocks)[name].limits  # of the first block's second half: its own attention is not rounded yet
    assert found.low == pytest.approx(extremes.low, rel=1e-4)
    assert found.high == pytest.approx(extremes.high, rel=1e-4)


def test_the_block_loss_chooses_the_exponent_whose_block_errs_least(tiny_folders, random_samples):
    """The oracle runs the block for every exponent with the weights that the exponent gives."""
    folder, where = tiny_folders["llava-llama"], "model.language_model.layers.0"
    kept = {"vision": {"bits": 16}, "connector": {"bits": 16}}
    rules = [{"match": ".*", "bits": 16}, {"match": rf"{where}\.mlp\.(gate|up)_proj", "bits": 3}]
    recipe = {"components": kept, "rules": rules, "options": {"awq_loss": "block"}}
    blocks, calibration = run(folder, "llava-llama", random_samples, **recipe)
    changed = next(block for block in blocks if block.block.name == where).changed
    norm = f"{where}.post_attention_layernorm.weight"

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    layer, caught = model.get_submodule(where), []
    hook = layer.register_forward_pre_hook(lambda m, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
    inputs, names = [], ("gate_proj", "up_proj")
    watch = layer.mlp.gate_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    losses = {}
    with torch.no_grad():
        for batch in calibration.batches:
            model(**batch, use_cache=False)
        hook.remove(), watch.remove()
        mean = torch.cat([x.flatten(0, 1) for x in inputs]).abs().mean(0)
        weights = {name: layer.mlp.get_submodule(name).weight.clone() for name in names}
        targets = [layer(*args, **kwargs) for args, kwargs in caught]
        for step in range(20):
            scale = mean ** (step / 20)
            scale = scale / (scale.max() * scale.min()).sqrt()
            for name in names:
                rounded = to_grid(weights[name] * scale, Grid(3, 32)).dequantize() / scale
                layer.mlp.get_submodule(name).weight.copy_(rounded)
            outputs = [layer(*args, **kwargs) for args, kwargs in caught]
            losses[step] = sum((one - two).square().sum().item() for one, two in zip(outputs, targets, strict=True))
    best = min(losses, key=losses.get)
    before = model.get_parameter(norm)
    expected = mean ** (best / 20)
    expected = before / (expected / (expected.max() * expected.min()).sqrt())
    assert best > 0
    torch.testing.assert_close(changed[norm].float(), expected.detach(), rtol=2e-3, atol=1e-3)


def test_biases_are_rounded_only_when_asked_for(tiny_folders, random_samples):
    name = "vision_model.encoder.layers.0.mlp.fc1.bias"
    left, rounded = (
        next(block for block in run(tiny_folders["blip2-opt"], "blip2-opt", None, **RECIPES[recipe])[0]).changed
        for recipe in ("uniform", "biases")
    )
    assert not left
    before = tiny.tiny("blip2-opt").half().get_parameter(name).float()
    step = (before.max().clamp(min=0) - before.min().clamp(max=0)) / 255
    assert len(rounded[name].unique()) <= 256
    assert 0 < (rounded[name].float() - before).abs().max() <= step * 0.51 + 1e-3


def test_with_weighted_tokens_the_gram_matrix_counts_the_image_as_the_loss_does(tiny_folders, random_samples):
    plain, weighted = (
        sites(run(tiny_folders["llava-llama"], "llava-llama", random_samples, **RECIPES[recipe])[0])
        for recipe in ("gptq", "weighted")
    )
    vision = [name for name in plain if "vision_tower" in name]
    language = [name for name in plain if "language_model" in name]
    assert all(torch.equal(plain[name].weight.codes, weighted[name].weight.codes) for name in vision)
    assert any(not torch.equal(plain[name].weight.codes, weighted[name].weight.codes) for name in language)


def test_one_linear_that_wants_a_scale_gets_it_whatever_the_others_want(tiny_folders, random_samples):
    """Its siblings count in the search, are folded too, and are rounded by their own methods."""
    folder, where = tiny_folders["llava-llama"], "model.language_model.layers.0.self_attn"
    for method, rule in (("awq", {"method": "rtn"}), ("smoothquant", {"method": "rtn", "activations": "none"})):
        activations = PER_TOKEN if method == "smoothquant" else "none"
        rules = [{"match": f"{where}.q_proj", **rule}]
        blocks, _ = run(folder, "llava-llama", random_samples, method=method, activations=activations, rules=rules)
        found = sites(blocks)
        assert all(found[f"{where}.{name}_proj"].fold is not None for name in "qkv")
        assert found[f"{where}.q_proj"].scheme.inputs is None


def test_rows_are_kept_from_all_over_an_input_and_not_its_first():
    sums = Sums(16)
    sums.add(torch.arange(100.0).unsqueeze(1).expand(100, 16), keep=4)
    sums.add(torch.zeros(2, 16), keep=4)
    assert sums.statistics().rows[:, 0].tolist() == [12, 37, 62, 87, 0, 0]


@torch.no_grad()
def test_ranges_are_tuned_of_what_smoothing_leaves(tmp_path, random_samples):
    """A vision tower with outliers: the tuned ranges must fit the inputs that the fold makes smaller."""
    model = tiny.tiny("llava-llama")
    for layer in model.model.vision_tower.encoder.layers:
        for norm, readers in ((layer.layer_norm1, ("q_proj", "k_proj", "v_proj")), (layer.layer_norm2, ("fc1",))):
            for channel in (3, 17, 40):
                norm.weight[channel] *= 30
                norm.bias[channel] *= 30
                for reader in readers:
                    owner = layer.self_attn if reader.endswith("proj") else layer.mlp
                    owner.get_submodule(reader).weight[:, channel] /= 30
    model.half().save_pretrained(tmp_path)
    tiny.processor("llava-llama").save_pretrained(tmp_path)
    errors = {}
    for tuned in (False, True):
        recipe = {"method": "smoothquant+qvlm", "bits": 8, "group_size": "tensor", "activations": PER_TENSOR}
        options = {"vision_tuning": tuned, "cross_layer": False}
        _, calibration = run(tmp_path, "llava-llama", random_samples, **recipe, options=options)
        (_, outputs), (_, references) = calibration.played[0], calibration.reference_played[0]
        errors[tuned] = sum(
            (outputs[index].read() - references[index].read()).square().sum().item() for index in outputs
        )
    assert errors[True] < 1.5 * errors[False]


@pytest.mark.parametrize(("folder", "more"), [("llava-llama", {}), ("blip2-opt", {"head": {"bits": 8}})])
def test_ranges_are_tuned_beside_a_quantized_embedding(folder, more, tiny_folders, random_samples):
    checkpoint = open_checkpoint(str(tiny_folders[folder]))
    model = checkpoint.skeleton()
    content = {"method": "qvlm", "bits": 8, "group_size": 32, "activations": PER_TOKEN, "embedding": {"bits": 8}}
    recipe = make_recipe({**content, **more} if not more else {**content, "head": {"method": "rtn", "bits": 8}})
    plan = ends.plan(checkpoint, model, recipe)
    assignment = recipe.assign(plan)
    batches = prepare(random_samples, tiny.processor(folder), checkpoint.family)
    blocks = list(quantize(checkpoint, model, plan, assignment, Calibration(model, batches, True)))
    assert any(block.block.component == "vision" and block.sites for block in blocks)
