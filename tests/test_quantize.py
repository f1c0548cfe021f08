import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText

from vlmq.exporter import folds
from vlmq.exporter.calibration import Calibration, prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.quantize import quantize
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.samples import Sample
from vlmq.exporter.walk import walk
from vlmq.kernels.grid import QuantizedWeight, to_grid


def run(folder, variant, samples, watch=lambda model: None, **recipe):
    """Quantize a tiny checkpoint: what came out, and the calibration with what every stage put out."""
    checkpoint = open_checkpoint(str(folder))
    model = checkpoint.skeleton()
    found = walk(model, checkpoint.family)
    assignment = make_recipe({"group_size": 32, **recipe}).assign(found)
    calibration = None
    if samples:
        calibration = Calibration(model, prepare(samples, tiny.processor(variant), checkpoint.family))
    blocks = []
    for block in quantize(checkpoint, model, found, assignment, calibration):
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
    return model


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_block_saw_what_the_whole_quantized_model_gives_it(method, variant, tiny_folders, random_samples):
    blocks, calibration = run(tiny_folders[variant], variant, random_samples, method=method)
    model = fake_quantized(tiny_folders[variant], blocks)
    caught = {}
    for stage, _ in calibration.played:
        model.get_submodule(stage[-1].name).register_forward_hook(
            lambda module, args, output, name=stage[-1].name: caught.__setitem__(name, output)
        )
    for index, batch in enumerate(calibration.batches):
        model(**batch)
        for stage, outputs in calibration.played:
            torch.testing.assert_close(outputs[index], caught[stage[-1].name], rtol=1e-4, atol=1e-4)


def test_awq_leaves_a_smaller_error_than_rtn_at_every_component(variant, tiny_folders, random_samples):
    losses = {}
    for method in METHODS:
        blocks, _ = run(tiny_folders[variant], variant, random_samples, method=method, bits=3)
        for block in blocks:
            for solved in block.sites.values():
                losses.setdefault((block.block.component, method), []).append(solved.loss)
    for component in ("vision", "connector", "language"):
        assert sum(losses[component, "awq"]) < sum(losses[component, "rtn"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group", [32, -1])
def test_quantizing_a_fused_qkv_equals_quantizing_its_parts(method, group, tiny_folders, random_samples):
    folder = tiny_folders["blip2-opt"]
    fused, split = (
        sites(run(folder, "blip2-opt", random_samples, method=method, group_size=group, qkv=qkv)[0])
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
    assert q.folded
    assert f"{name}.weight" in block.changed
    assert block.changed[f"{name}.weight"].dtype == torch.float16


def test_one_block_at_most_is_in_memory(variant, tiny_folders, random_samples):
    """Promise 7, at every block: no other block's weights are anywhere but on the meta device."""
    seen = []

    def watch(model):
        found = walk(model, open_checkpoint(str(tiny_folders[variant])).family)
        seen.append(sum(not next(model.get_submodule(block.name).parameters()).is_meta for block in found.blocks))

    run(tiny_folders[variant], variant, random_samples, watch)
    assert seen
    assert max(seen) == 1


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
