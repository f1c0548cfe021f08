"""The faults of the research code that the papers were measured with, put back one by one: each must be caught.

A test first shows that vlmq does not have the fault, then puts it back and sees the same check fail.
"""

from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from vlmq.exporter import ends, families, folds, pipeline
from vlmq.exporter.calibration import Calibration, prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import feedforward
from vlmq.exporter.methods import awq
from vlmq.exporter.methods.problem import Problem
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.quantize import quantize
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.sums import Sums
from vlmq.exporter.walk import walk
from vlmq.formats import compressed_tensors
from vlmq.formats.compressed_tensors import packed_bytes
from vlmq.kernels.grid import Grid, to_grid


def run(folder, variant, samples, **recipe):
    """Quantize a tiny checkpoint, every fold checked on the way: all that came out."""
    checkpoint = open_checkpoint(str(folder))
    model = checkpoint.skeleton()
    made = make_recipe({"group_size": 32, **recipe})
    plan = ends.plan(checkpoint, model, made)
    batches = prepare(samples, tiny.processor(variant), checkpoint.family)
    return list(quantize(checkpoint, model, plan, made.assign(plan), Calibration(model, batches)))


def test_1_the_search_for_a_scale_does_better_than_no_scaling(monkeypatch):
    """There exponents were whole numbers and scales not normalised."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator) for rows in (512, 48))
    x[:, [3, 17, 40]] *= 25
    sums = Sums(64)
    sums.add(x)
    statistics = sums.statistics()
    scheme = Scheme("awq", Grid(3, 32))

    def gain():
        scale = awq.rescale(Problem([weight], [scheme], statistics, torch.float16, lambda scale: 0.0))
        found = to_grid(weight * scale, scheme.grid).dequantize() / scale
        plain = to_grid(weight, scheme.grid).dequantize()
        return (x @ (plain - weight).T).square().sum() / (x @ (found - weight).T).square().sum()

    assert gain() > 2
    monkeypatch.setattr(awq, "EXPONENTS", tuple(range(20)))
    monkeypatch.setattr(awq, "candidate", lambda seen, exponent: seen.mean_absolute**exponent)
    assert not gain() > 2


def forgetful_of_biases(entry, scale, model):
    source = model.get_submodule(entry.source.name)
    rows = entry.source.rows or slice(None)
    source.weight[rows] /= scale if source.weight.ndim == 1 else scale.unsqueeze(1)
    for site in entry.sites:
        model.get_submodule(site.name).weight *= scale


def forgetful_of_rms_norms(entry, scale, model):
    source = model.get_submodule(entry.source.name)
    if isinstance(source, nn.LayerNorm | nn.Linear):
        FOLD(entry, scale, model)
    else:
        for site in entry.sites:
            model.get_submodule(site.name).weight *= scale


def dividing_the_whole_bias(entry, scale, model):
    FOLD(entry, scale, model)
    source = model.get_submodule(entry.source.name)
    if entry.source.rows and len(source.bias) > len(scale):
        source.bias[: entry.source.rows.start] /= scale.repeat(2)


def into_the_wrong_heads(entry, scale, model):
    """As if rows were stacked [heads, 3, d], where BLIP-2 stacks [3, heads, d]."""
    rows = entry.source.rows
    if rows and rows.stop - rows.start < len(model.get_submodule(entry.source.name).weight):
        rows = slice(rows.start // 2, rows.start // 2 + rows.stop - rows.start)
        entry = replace(entry, source=replace(entry.source, rows=rows))
    FOLD(entry, scale, model)


FOLD = folds.fold


@pytest.mark.parametrize(
    ("variant", "fault"),
    [
        ("blip2-opt", forgetful_of_biases),  # 2
        ("llava-llama", forgetful_of_rms_norms),  # 4
        ("blip2-opt", dividing_the_whole_bias),  # 5
        ("blip2-opt", into_the_wrong_heads),  # 5
    ],
)
def test_2_4_5_a_fold_that_changes_a_block_stops_the_run(variant, fault, tiny_folders, random_samples, monkeypatch):
    assert run(tiny_folders[variant], variant, random_samples)
    monkeypatch.setattr(folds, "fold", fault)
    with pytest.raises(VlmqError, match="folding changed its output"):
        run(tiny_folders[variant], variant, random_samples)


@pytest.mark.parametrize(("variant", "table"), [("blip2-opt", "VIT"), ("llava-llama", "CLIP")])
def test_3_a_fold_across_gelu_stops_the_run(variant, table, tiny_folders, random_samples, monkeypatch):
    across = (*getattr(families, table)[:-1], feedforward("mlp.fc2", after="mlp.fc1"))
    monkeypatch.setattr(families, table, across)
    with pytest.raises(VlmqError, match=r"layers\.0: folding changed its output"):
        run(tiny_folders[variant], variant, random_samples)


@pytest.mark.parametrize(
    ("table", "line", "wrong"),
    [
        ("OPT", 0, "self_atn.{q,k,v}_proj"),
        ("QFORMER", 5, "intermediate.dense"),
        ("QFORMER", 3, "crossattention.self.{key,value}"),
    ],
)
def test_6_a_name_that_reaches_no_linear_stops_the_walk(table, line, wrong, monkeypatch):
    """The three that left OPT's attention, the Q-Former's feed-forward and its cross-attention in full precision."""
    reads = list(getattr(families, table))
    reads[line] = replace(reads[line], linears=families._expand(wrong))
    monkeypatch.setattr(families, table, tuple(reads))
    model = tiny.tiny("blip2-opt")
    with pytest.raises(VlmqError, match=r"matches no linear|not in the table"):
        walk(model, families.family_of(model.config))


@pytest.mark.parametrize("where", [{"component": "vision"}, {"kind": "attention"}, {"match": "fc2"}])
def test_7_sixteen_bits_leave_every_byte_as_it_was(where, tiny_folders, random_samples, tmp_path, pictures):
    folder = tiny_folders["blip2-opt"]
    recipe = make_recipe({"group_size": 32, "method": "rtn", "rules": [{**where, "bits": 16}]})
    request = pipeline.Request(str(folder), tmp_path / "out", recipe, formats="safetensors", verify=False)
    made = pipeline.export(request).manifest
    model = tiny.tiny("blip2-opt")
    (rule,) = recipe.rules
    left = [site.name for site in walk(model, families.family_of(model.config)).sites if rule.selects(site, "front")]
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert left
    for name in left:
        assert made.kept[name] == "16 bits asked for"
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    with pytest.raises(ValueError, match="16 bits"):  # nor is there a grid of 65536 levels to round them to
        Grid(16, 32)


def test_8_samples_that_were_calibrated_on_are_not_evaluated_on(tiny_folders, pictures, tmp_path, monkeypatch):
    request = pipeline.Request(
        str(tiny_folders["llava-llama"]),
        tmp_path / "out",
        make_recipe({"group_size": 32}),
        formats="safetensors",
        calibration=str(pictures),
        data=str(pictures),
        samples=2,
    )
    with pytest.raises(VlmqError, match="was calibrated on"):
        pipeline.export(request)
    monkeypatch.setattr(pipeline.datas, "refuse_leakage", lambda calibration, evaluation: None)
    with pytest.raises(VlmqError, match="was calibrated on"):  # verification looks again, at what the manifest says
        pipeline.export(request)


def test_9_every_method_spends_the_same_bytes_on_the_same_recipe():
    """There AWQ had asymmetric groups of 128 and GPTQ symmetric rows, and the table called both 4 bits."""
    model = tiny.tiny("blip2-opt")
    plan = walk(model, families.family_of(model.config))
    spent = {}
    for method in METHODS:
        if method == "uniform":  # has one grid only, and says so
            continue
        activations = {"bits": 8} if METHODS[method].for_inputs else "none"
        content = {"method": method, "group_size": 32, "activations": activations}
        schemes = make_recipe(content).assign(plan).schemes
        spent[method] = sum(packed_bytes((site.rows, site.columns), schemes[site.name].grid) for site in plan.sites)
    assert len(set(spent.values())) == 1
    unlike = make_recipe({"method": "gptq", "group_size": "row"}).assign(plan).schemes
    assert sum(packed_bytes((s.rows, s.columns), unlike[s.name].grid) for s in plan.sites) != spent["awq"]


def test_10_a_tied_head_stays_as_the_embedding_it_is(tiny_folders, random_samples):
    folder, head = tiny_folders["blip2-opt"], "language_model.lm_head"
    checkpoint = open_checkpoint(str(folder))
    plan = walk(checkpoint.skeleton(), checkpoint.family)
    assert plan.kept[head] == "output head, tied to the token embedding"
    blocks = run(folder, "blip2-opt", random_samples, method="rtn", rules=[{"match": ".*", "bits": 4}])
    assert not any(head in block.sites or any("embed_tokens" in name for name in block.changed) for block in blocks)
    with pytest.raises(VlmqError, match="tied to the token embedding"):
        run(folder, "blip2-opt", random_samples, head={"bits": 8})


@pytest.mark.parametrize("symmetric", [True, False])
def test_11_bits_per_weight_count_scales_and_zeros(symmetric, monkeypatch):
    weight = to_grid(torch.randn(64, 256), Grid(4, 32, symmetric))
    stored = compressed_tensors.pack("linear", weight)
    counted = packed_bytes((64, 256), weight.grid)
    assert counted == sum(tensor.nbytes for tensor in stored.values())
    bits = 8 * (counted - stored["linear.weight_shape"].nbytes) / (64 * 256)
    assert bits == 4 + 16 / 32 + (0 if symmetric else 4 / 32)
