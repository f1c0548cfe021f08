"""The layouts of mmq, against recipes written by hand that say the same."""

import json

import pytest
import tiny
import torch
import yaml
from transformers import AutoModelForImageTextToText

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import family_of
from vlmq.exporter.recipe import read_recipe
from vlmq.exporter.walk import walk


def _walk(variant):
    config = tiny.config(variant)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 5
    if variant == "blip2-opt":
        config.qformer_config.num_hidden_layers = 4
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return walk(model, family_of(config))


@pytest.fixture(scope="module")
def blip2():
    return _walk("blip2-opt")


@pytest.fixture(scope="module")
def llava():
    return _walk("llava-llama")


@pytest.fixture
def read(tmp_path):
    """A recipe from a file with this content; the tiny models' columns need narrower groups than mmq's 128."""

    def read(content, name="mmq.json"):
        file = tmp_path / name
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        made = read_recipe(file)
        return made.model_copy(update={"group_size": 32}) if made.method == "awq" else made

    return read


def entry(part, group="ALL", kind="BOTH", bits=4):
    return {"model_part": part, "layer_group": group, "layer_type": kind, "num_bits": bits}


@pytest.mark.parametrize(
    ("entries", "rules"),
    [
        ([entry("VIT", "FIRST", "MLP", 5)], ["{component: vision, blocks: front, kind: feedforward, bits: 5}"]),
        ([entry("LLM", "MIDDLE", "ATTENTION", 3)], ["{component: language, blocks: middle, kind: attention, bits: 3}"]),
        ([entry("LLM", "LAST")], ["{component: language, match: 'layers.[34]', bits: 4}"]),
        ([entry("QFORMER", "LAST", "MLP", 8)], ["{match: 'qformer.*[23].(intermediate|output)_query', bits: 8}"]),
        (
            [entry("QFORMER")],
            ["{component: connector, kind: attention, bits: 4}", "{component: connector, kind: feedforward, bits: 4}"],
        ),
        (
            [entry("VIT", bits=8), entry("LLM", bits=6), entry("LLM", "FIRST", bits=16)],
            ["{component: vision, bits: 8}", "{component: language, bits: 6}", "{match: 'decoder.*s.0', bits: 16}"],
        ),
    ],
)
def test_the_uniform_list_says_what_its_rules_would(blip2, read, entries, rules):
    written = "method: uniform\nbits: 16\nrules:\n" + "".join(f"- {rule}\n" for rule in rules)
    found, expected = read(entries).assign(blip2), read(written, "recipe.yaml").assign(blip2)
    assert found == expected
    assert len(found.schemes) < len(blip2.sites)


def test_no_linear_of_a_part_is_missed(blip2, read):
    """mmq's names missed OPT's attention and the Q-Former's feed-forward and cross-attention."""
    parts = [entry(part) for part in ("VIT", "QFORMER", "LLM")]
    quantized = set(read(parts).assign(blip2).schemes)
    assert {site.name for site in blip2.sites} - quantized == {"language_projection"}
    attention = read([entry("LLM", kind="ATTENTION"), entry("QFORMER", kind="MLP")]).assign(blip2).schemes
    assert sum(".self_attn." in name for name in attention) == 5 * 4
    assert sum("_query.dense" in name for name in attention) == 4 * 2
    assert len(attention) == 5 * 4 + 4 * 2


def test_sixteen_bits_are_left_alone_and_the_later_entry_wins(blip2, read):
    assignment = read([entry("LLM", bits=16), entry("VIT", bits=16), entry("VIT", bits=3)]).assign(blip2)
    assert {scheme.grid.bits for scheme in assignment.schemes.values()} == {3}
    assert all(name.startswith("vision_model") for name in assignment.schemes)
    assert assignment.kept["language_model.model.decoder.layers.0.fc1"] == "16 bits asked for"


VIT = {"self_attn": 2, "self_attn_output": 3, "fc1": 4, "fc2": 5}
QFORMER = {
    "self_attn": 2,
    "self_attn_output": 3,
    "cross_attn": 4,
    "cross_attn_output": 5,
    "intermediate_query": 6,
    "output_query": 8,
}
OPT = {"self_attn": 8, "self_attn_output": 6, "fc1": 16, "fc2": 4}


def test_awq_objects_say_what_their_rules_would(blip2, read):
    written = """
method: awq
bits: 16
symmetric: false
group_size: 32
rules:
- {component: vision, match: qkv, bits: 2}
- {component: vision, match: self_attn.projection, bits: 3}
- {component: vision, match: fc1, bits: 4}
- {component: vision, match: fc2, bits: 5}
- {component: connector, kind: attention, bits: 2}
- {component: connector, match: output.dense, bits: 3}
- {component: connector, match: crossattention, bits: 4}
- {component: connector, match: crossattention.output, bits: 5}
- {component: connector, match: intermediate_query, bits: 6}
- {component: connector, match: output_query, bits: 8}
- {component: language, match: '[qkv]_proj', bits: 8}
- {component: language, match: out_proj, bits: 6}
- {component: language, match: fc2, bits: 4}
"""
    found = read({"vit_layers": VIT, "qformer_layers": QFORMER, "llm_layers": OPT}).assign(blip2)
    assert found == read(written, "recipe.yaml").assign(blip2)


@pytest.mark.parametrize(
    ("layers", "kinds", "path"), [("qformer_layers", QFORMER, "qformer."), ("llm_layers", OPT, "language_model.")]
)
def test_each_kind_of_an_awq_object_has_linears_of_its_own_and_none_is_left(blip2, read, layers, kinds, path):
    chosen = [name for kind in kinds for name in read({layers: {kind: 4}}).assign(blip2).schemes]
    assert sorted(chosen) == sorted(site.name for site in blip2.sites if site.name.startswith(path))


def test_awq_objects_for_llava_say_what_their_rules_would(llava, read):
    rules = [
        {"component": "vision", "kind": "attention", "bits": 8},
        {"component": "vision", "kind": "feedforward", "bits": 6},
        {"component": "language", "kind": "attention", "bits": 3},
        {"component": "language", "kind": "feedforward", "bits": 4},
    ]
    written = {"method": "awq", "bits": 16, "symmetric": False, "group_size": 32, "rules": rules}
    made = {"vision_layers": {"self_attn": 8, "mlp": 6}, "llm_layers": {"self_attn": 3, "mlp": 4}}
    assert read(made).assign(llava) == read(yaml.safe_dump(written), "recipe.yaml").assign(llava)


def test_awq_is_in_asymmetric_groups_of_128(tmp_path):
    file = tmp_path / "awq.json"
    file.write_text(json.dumps({"vit_layers": VIT}))
    recipe = read_recipe(file)
    assert (recipe.method, recipe.bits, recipe.group_size, recipe.symmetric) == ("awq", 16, 128, False)


def gptq(bits, group=-1, **changes):
    settings = {"percent_dampening": 0.02, "use_symmetric": True, "use_act_order": False, "use_static_groups": False}
    return {"bits": bits, "group_size": group, **settings, **changes}


def test_gptq_objects_say_what_their_rules_would(blip2, llava, read):
    written = """
method: gptq
bits: 16
options: {damp: 0.02, act_order: false, static_groups: false}
rules:
- {component: vision, bits: 8, group_size: row}
- {component: connector, bits: 4, group_size: 32, symmetric: false}
- {match: ^language_projection$, bits: 3, symmetric: true, group_size: row, options: {act_order: true}}
- {component: language, bits: 3, group_size: row, options: {act_order: true}}
"""
    language = gptq(3, use_act_order=True)
    made = {"vision": gptq(8), "qformer": gptq(4, 32, use_symmetric=False), "language": language}
    assert read(made).assign(blip2) == read(written, "recipe.yaml").assign(blip2)
    named = {site.component for site in llava.sites if site.name in read({"language": language}).assign(llava).schemes}
    assert named == {"language"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([entry("VTI")], "mmq.json: entry 0: model_part 'VTI'; choose VIT, QFORMER, LLM"),
        ([entry("VIT", "END")], "mmq.json: entry 0: layer_group 'END'; choose FIRST, MIDDLE, LAST, ALL"),
        ([entry("VIT"), entry("LLM", kind=["FF"])], "entry 1: layer_type \"['FF']\"; choose MLP, ATTENTION, BOTH"),
        ([entry("VIT", bits=7)], "mmq.json: entry 0: num_bits: 7 bits; choose one of 2, 3, 4, 5, 6, 8, or 16"),
        ([entry("VIT"), entry("LLM", bits="four")], "mmq.json: entry 1: num_bits: 'four'; choose one of 2, 3"),
        ([entry("VIT", bits=None)], "mmq.json: entry 0: num_bits is missing; add it"),
        ([{"model_part": "VIT", "bits": 4}], "mmq.json: entry 0: unknown key 'bits'; choose model_part, layer_group"),
        ([{"model_part": "VIT", "num_bits": 4}], "mmq.json: entry 0: layer_group is missing; add it"),
        (["VIT"], "mmq.json: entry 0: 'VIT' is no object; give one with the keys model_part"),
        ({"vit_layers": {"attn": 4}}, "mmq.json: vit_layers: unknown key 'attn'; choose self_attn, self_attn_output"),
        ({"vit_layers": 4}, "mmq.json: vit_layers: 4 is no object"),
        ({"vision": gptq(4, group=50)}, "mmq.json: vision: group_size: a group of 50 columns"),
        ({"vision": gptq(4), "language": gptq(7)}, "mmq.json: language: bits: 7 bits; choose one of"),
        ({"vision": gptq(4, percent_dampening=0)}, "mmq.json: vision: percent_dampening: 0; choose a number above 0"),
        ({"vision": gptq(4, use_symmetric="x")}, "mmq.json: vision: use_symmetric: 'x'; choose true or false"),
        ({"llm_layers": {"fc1": 4, "fc2": 7}}, "mmq.json: llm_layers: fc2: 7 bits; choose one of 2, 3, 4, 5, 6, 8"),
        ({"llm_layers": {"fc1": None}}, "mmq.json: llm_layers: fc1 is missing; add it"),
        ({"vision": {"group_size": -1}}, "mmq.json: vision: bits is missing; add it"),
        ({"qformer_layers": {"output_txt": 4}}, r"\d+\\.output\\.dense$' matches no linear"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_in_one_line(blip2, read, content, message):
    with pytest.raises(VlmqError) as refused:
        read(content).assign(blip2)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
