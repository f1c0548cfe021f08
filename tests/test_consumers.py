"""A consumer gets quantized what it can read, and a person is told of all the rest before the work."""

import json
import re
from dataclasses import replace

import pytest
import tiny
import torch
from packed import packed_folder
from torch import nn
from transformers import AutoModelForImageTextToText

from vlmq.exporter import consumers, families
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.walk import walk
from vlmq.formats import compressed_tensors, manifest
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.targets import matches
from vlmq.kernels.grid import ROW, Grid


def plan(variant):
    model = tiny.tiny(variant)
    return walk(model, families.family_of(model.config))


def assign(variant, **content):
    return make_recipe({"group_size": 32, "method": "rtn", **content}).assign(plan(variant))


def refusal(variant, **content):
    with pytest.raises(VlmqError) as refused:
        assign(variant, **content)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("variant", tiny.DECODERS)
def test_vllm_gets_the_language_model_s_linears_and_nothing_else_quantized(variant):
    made = assign(variant, consumer="vllm")
    language = {site.name for site in plan(variant).sites if site.component == "language"}
    assert set(made.schemes) == language
    left = {site.name for site in plan(variant).sites} - language
    assert left
    assert all("vLLM" in made.kept[name] for name in left)


def test_vllm_is_given_no_encoder_decoder():
    assert refusal("blip2-t5", consumer="vllm") == (
        "language_model.encoder.block.0: vLLM runs no encoder-decoder; choose another --consumer"
    )


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("consumer", ["any", "transformers", "onnxruntime"])
def test_the_others_get_all_that_the_recipe_says(variant, consumer):
    assert assign(variant, consumer=consumer).schemes == assign(variant).schemes
    assert assign(variant, consumer=consumer).told == ()


def test_a_line_tells_of_each_thing_left_alone_with_how_much_and_why():
    assert assign("blip2-opt", consumer="vllm").told == (
        "vision_model.encoder.layers: 8 linears left in full precision: "
        "vLLM builds this vision tower without a name that a target could match",
        "qformer.encoder.layer: 16 linears left in full precision: vLLM has no quantized Q-Former",
        "language_projection: 1 linear left in full precision: vLLM has no quantized projection",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"components": {"connector": {"bits": 8}}},
            "components.connector: of what it says nothing would be done",
        ),
        ({"components": {"vision": {"method": "awq"}}}, "components.vision: of what it says nothing would be done"),
        ({"rules": [{"match": "qformer", "bits": 8}]}, r"rules.0: of what it says nothing would be done"),
        ({"bits": 3}, "3 bits, which vllm reads in another layout or not at all; choose 2, 4 or 8 bits"),
        ({"group_size": 16}, "groups of 16, for which vllm has no kernel; choose --group-size 32, 64 or 128 or row"),
        ({"activations": {"bits": 8}}, "vllm rounds inputs for int-quantized files, which vlmq does not write"),
        ({"rules": [{"match": "q_proj", "bits": 8}]}, "with which vllm stacks it into one qkv_proj; give both one"),
    ],
)
def test_a_wish_that_vllm_cannot_grant_is_one_line(content, message):
    assert re.search(message, refusal("blip2-opt", consumer="vllm", **content))


def test_the_ends_are_in_half_precision_for_vllm():
    model = tiny.tiny("llava-llama")
    family = families.family_of(model.config)
    head = families.Stage("language", "lm_head", (families.Reads(("",), "head"),), single=True)
    found = walk(model, replace(family, stages=(*family.stages, head), kept={}))
    with pytest.raises(VlmqError, match="vLLM takes it in half precision alone; leave head out of the recipe"):
        make_recipe({"group_size": 32, "consumer": "vllm", "head": {"bits": 8}}).assign(found)


def test_sixteen_bits_and_rules_that_reach_further_are_no_contradiction():
    content = {"components": {"vision": {"bits": 16}}, "rules": [{"kind": "feedforward", "bits": 8}]}
    made = assign("blip2-opt", consumer="vllm", **content)
    assert {scheme.grid.bits for scheme in made.schemes.values()} == {4, 8}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"symmetric": False, "components": {"vision": {"bits": 8}}},
            "cannot load several grids of which some",
        ),
        ({"symmetric": False, "activations": {"bits": 8}}, "rounds no inputs where weights are asymmetric"),
    ],
)
def test_transformers_is_not_given_what_its_reader_cannot_load(content, message):
    assert message in refusal("llava-llama", consumer="transformers", **content)
    assert assign("llava-llama", **content).schemes  # which is no reason to refuse it for others


def test_onnxruntime_is_given_rounded_inputs():
    schemes = assign("llava-llama", consumer="onnxruntime", activations={"bits": 8}).schemes
    assert all(scheme.inputs for scheme in schemes.values())


@pytest.mark.parametrize(
    ("consumer", "wrong"), [("vllm", "onnx"), ("transformers", "onnx"), ("onnxruntime", "safetensors")]
)
def test_a_format_that_the_consumer_does_not_read_is_refused(consumer, wrong):
    with pytest.raises(VlmqError, match=f"--format {wrong}: {consumer} reads "):
        consumers.refuse_format(consumer, wrong)
    consumers.refuse_format(consumer, "both")
    consumers.refuse_format(consumer, consumers.formats(consumer))
    assert consumers.formats("any") == "both"


def vllm_linears(variant):
    """The linears that vLLM builds, by its own names (read in its source), each with what it stacks."""
    if variant == "blip2-opt":
        vision = [f".encoder.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in ("self_attn.qkv", "mlp.fc1")]
        layers = "language_model.model.decoder.layers"
        language = ("self_attn.qkv_proj", "self_attn.out_proj", "fc1", "fc2")
        return vision, [f"{layers}.{layer}.{leaf}" for layer in (0, 1) for leaf in language]
    vision = [f"vision_tower.vision_model.encoder.layers.{layer}.self_attn.qkv_proj" for layer in (0, 1)]
    vision += ["multi_modal_projector.linear_1", "language_model.lm_head"]
    language = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return vision, [f"language_model.model.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in language]


@pytest.mark.parametrize("variant", ["blip2-opt", "llava-llama"])
def test_targets_and_ignore_match_vllm_s_own_names_too(variant):
    made = assign(variant, consumer="vllm")
    grids = {name: Grids(scheme.grid) for name, scheme in made.schemes.items()}
    names = consumers.aliases("vllm", {*grids, *made.kept})
    config = compressed_tensors.quantization_config(grids, made.kept, names)
    (group,) = config["config_groups"].values()
    kept, quantized = vllm_linears(variant)
    for name in (*quantized, *grids):
        assert any(matches(target, name) for target in group["targets"]), name
        assert not any(matches(target, name) for target in config["ignore"]), name
    for name in (*kept, *made.kept):
        assert any(matches(target, name) for target in config["ignore"]), name
        assert not any(matches(target, name) for target in group["targets"]), name


@pytest.mark.parametrize("variant", ["blip2-opt", "llava-llama"])
def test_an_export_for_vllm_says_so_in_its_manifest_and_loads_in_transformers(variant, tiny_folders, tmp_path):
    recipe = make_recipe({"method": "rtn", "group_size": 32, "consumer": "vllm"})
    lines = []
    request = Request(str(tiny_folders[variant]), tmp_path / "out", recipe, formats="safetensors", verify=False)
    made = export(request, tell=lines.append).manifest
    assert lines == list(assign(variant, consumer="vllm").told)
    assert made.recipe["consumer"] == "vllm"
    assert any("vLLM" in reason for reason in made.kept.values())
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    source = AutoModelForImageTextToText.from_pretrained(tiny_folders[variant], dtype=torch.float32)
    changed = {
        name
        for name, module in source.named_modules()
        if isinstance(module, nn.Linear) and not torch.equal(module.weight, model.get_submodule(name).weight)
    }
    assert changed == set(assign(variant, consumer="vllm").schemes)


def test_mixed_bits_in_blip2_need_one_line_of_transformers_own_before_generate(tmp_path):
    """The line that notes, docs and cards print; `exec`, so that it is this very line."""

    def choose(name):
        return Grid(8, ROW) if "vision" in name else Grid(4, 32)

    packed_folder("blip2-opt", tmp_path / "out", choose)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2
    assert "dequantize" not in config
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    exec(compressed_tensors.UNPACK)
    from packed import inputs, reference

    weights = packed_folder("blip2-opt", tmp_path / "again", choose)
    expected = reference("blip2-opt", weights).generate(**inputs("blip2-opt"), max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**inputs("blip2-opt"), max_new_tokens=8, do_sample=False), expected)
    note = compressed_tensors.caveat({"a": Grids(Grid(8, ROW)), "b": Grids(Grid(4, 32))})
    assert compressed_tensors.UNPACK in note
    assert manifest.read(tmp_path / "out").tensors


def test_the_command_line_tells_it_before_the_work(vlmq, tiny_folders, tmp_path):
    flags = ("--method", "rtn", "--group-size", 32, "--consumer", "vllm", "--no-verify", "-o", tmp_path / "out")
    code, _, err = vlmq("export", tiny_folders["blip2-opt"], *flags)
    assert code == 0, err
    assert "note: qformer.encoder.layer: 16 linears left in full precision: vLLM has no quantized Q-Former\n" in err
    assert not (tmp_path / "out" / "onnx").exists()
    code, _, err = vlmq("export", tiny_folders["blip2-opt"], *flags[:-1], tmp_path / "no", "--connector-bits", 8)
    assert code == 2
    assert "components.connector" in err
    assert not (tmp_path / "no").exists()
