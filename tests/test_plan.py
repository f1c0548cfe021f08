import json
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import (
    Blip2Config,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    T5Config,
)
from transformers import OPTConfig as Opt
from typer.testing import CliRunner

from vlmq import cli
from vlmq.exporter import pipeline
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.inspection import inspect
from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.planning import machine
from vlmq.exporter.recipe import make_recipe
from vlmq.kernels import nbits
from vlmq.kernels.grid import Grid, to_grid


def blip2(width, ffn):
    """Salesforce/blip2-opt-*: EVA's ViT-g, a Q-Former of 12 layers, OPT of 32."""
    vision = Blip2VisionConfig(
        hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16, image_size=224
    )
    qformer = Blip2QFormerConfig(encoder_hidden_size=1408, cross_attention_frequency=2)
    text = Opt(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=ffn, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=50304,
    )  # fmt: skip
    return Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=32)


def flan(width, ffn):
    """Salesforce/blip2-flan-t5-*: the same before the text, and Flan-T5 of twice 24 layers, its head its own."""
    text = T5Config(
        d_model=width, d_ff=ffn, d_kv=64, num_heads=width // 64, num_layers=24, num_decoder_layers=24,
        vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    before = blip2(2560, 10240)
    return Blip2Config(
        vision_config=before.vision_config, qformer_config=before.qformer_config, text_config=text, num_query_tokens=32
    )


def llava(width, ffn, layers):
    """llava-hf/llava-1.5-*-hf: CLIP ViT-L/14 at 336 pixels, and Vicuna."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    heads = width // 128
    text = LlamaConfig(
        hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=32064,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text)


# The parameters that the models' pages on the Hub, and the output of PEFT's print_trainable_parameters, give.
REAL = {
    "blip2-opt-2.7b": (blip2(2560, 10240), 3_744_761_856, 0),
    "blip2-opt-6.7b": (blip2(4096, 16384), 7.75e9, 0.005e9),
    "blip2-flan-t5-xl": (flan(2048, 5120), 3.94e9, 0.005e9),
    "llava-1.5-7b": (llava(4096, 11008, 32), 7_063_427_072, 0),
    "llava-1.5-13b": (llava(5120, 13824, 40), 13.35e9, 0.005e9),
}


@pytest.fixture(scope="module")
def configurations(tmp_path_factory):
    """name -> a folder with nothing but the config.json of a model in half precision."""
    root = tmp_path_factory.mktemp("configurations")
    made = {name: config for name, (config, *_) in REAL.items()}
    made |= {variant: tiny.config(variant) for variant in tiny.VARIANTS}
    for name, config in made.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config.to_dict() | {"dtype": "float16"}))
    return {name: root / name for name in made}


def request(folder, output, **changes):
    recipe = make_recipe({"group_size": 32, **changes.pop("recipe", {})})
    made = Request(str(folder), output, recipe, samples=4, formats="safetensors", verify=False, gate=False)
    return replace(made, **changes)


def planned(folder, **changes):
    return pipeline.plan(request(folder, folder / "out", **changes))


def parts(plan, step):
    """name -> bytes, of the step that begins so."""
    (need,) = [need for need in plan.memory if need.step.startswith(step)]
    return {part.name: part.bytes for part in need.parts}


@pytest.mark.parametrize("name", REAL)
def test_a_configuration_alone_gives_the_published_count_of_parameters(name, configurations):
    _, published, rounded_by = REAL[name]
    found = planned(configurations[name])
    assert abs(found.parameters - published) <= rounded_by
    assert found.before == 2 * found.parameters


def test_the_parts_of_a_real_model_are_those_that_its_shapes_give(configurations):
    """LLaVA 1.5 7B by hand: seven linears and two norms a block, four distinct inputs, 577 + 32 tokens."""
    found = planned(configurations["llava-1.5-7b"], samples=128, recipe={"group_size": 128})
    block = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    calibrating = parts(found, "calibrating model.language_model.layers.0")
    assert calibrating["the block"] == block * 4
    assert calibrating["a tensor in flight"] == 4096 * 11008 * 2
    assert calibrating["statistics"] == (3 * 4096**2 + 11008**2) * 4
    waiting = 3 * 336**2 + 577 * 1024 + 577 * 4096 + (577 + 32) * 4096
    assert found.activations == 128 * 4 * waiting
    assert parts(found, "catching")["outside the blocks"] == pytest.approx(4 * 32064 * 4096, rel=0.01)
    solving = parts(planned(configurations["llava-1.5-7b"], recipe={"method": "gptq"}), "solving")
    assert solving["working copies"] == int(8 * 11008**2 + 4.25 * 4 * 2**24 + 4096 * 11008)  # down_proj's columns
    assert solving["statistics"] == 4 * 11008**2  # the others are solved and gone
    assert solving["codes"] == 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert found.components["language"].linears == 7 * 32
    assert found.components["vision"].linears == 6 * 23  # the last of CLIP's 24 blocks is never read


MIXED = {"components": {"vision": {"bits": 8}, "connector": {"bits": 16}}}
RECIPES = {
    "groups": {},
    "mixed": MIXED,
    "asymmetric rows": {"group_size": "row", "symmetric": False, "bits": 3},
    "v alone": {"qkv": "v-only"},
    "ends": {"head": {}, "embedding": {}},
    "rotated": {"rotate": ["language"]},
}


UNROTATED = [("blip2-t5", name) for name in RECIPES if name != "rotated"]


@pytest.mark.parametrize(
    ("variant", "name"), [(variant, name) for variant in ("blip2-opt", "llava-llama") for name in RECIPES] + UNROTATED
)
def test_the_bytes_foreseen_from_a_configuration_are_those_of_the_export(
    name, variant, configurations, tiny_folders, tmp_path
):
    recipe = {"method": "rtn", **RECIPES[name]}
    found = planned(configurations[variant], recipe=recipe)
    done = export(request(tiny_folders[variant], tmp_path / "out", recipe=recipe))
    file = done.folder / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size - header == found.after
    assert found.disk[0].parts[0].bytes == found.after


def test_a_configuration_alone_says_what_its_weights_are_stored_in(configurations, tiny_folders):
    recipe = make_recipe({"group_size": 32})
    alone, whole = (inspect(str(place["llava-llama"]), recipe) for place in (configurations, tiny_folders))
    assert (alone.before, alone.after) == (whole.before, whole.after)


@pytest.mark.parametrize("group", [16, 32, 96, "row", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_bytes_of_a_linear_in_a_graph_are_those_that_packing_it_makes(bits, symmetric, group):
    grid = Grid(bits, {"row": -1, "tensor": 0}.get(group, group), symmetric)
    packed = nbits.pack(to_grid(torch.randn(24, 192), grid))
    made = (packed.qweight, packed.scales, packed.qzeros)
    assert nbits.packed_bytes((24, 192), grid) == sum(part.nbytes for part in made if part is not None)


def test_a_graph_holds_a_tied_head_twice_and_no_block_that_never_runs(configurations):
    recipe = {"method": "rtn", "bits": 4, "group_size": 128}  # as large in both layouts
    tied, dead = (
        planned(configurations[name], formats="onnx", recipe=recipe) for name in ("blip2-opt-2.7b", "llava-1.5-7b")
    )
    for plan, extra in ((tied, 50304 * 2560 * 2), (dead, -(4 * 1024**2 + 2 * 1024 * 4096 + 13 * 1024) * 2)):
        tensors, graphs = (part.bytes for part in plan.disk[1].parts)
        assert graphs == pytest.approx(tensors + extra, rel=1e-5)


def test_packed_ends_are_as_small_in_graphs_as_their_bits(configurations):
    recipe = {"method": "rtn", "bits": 4, "group_size": 128}
    for name, vocabulary, width in (("blip2-opt-2.7b", 50304, 2560), ("llava-1.5-7b", 32064, 4096)):
        dense, packed = (
            planned(configurations[name], formats="onnx", recipe={**recipe, **ends}).disk[1].parts[1].bytes
            for ends in ({}, {"head": {}, "embedding": {}})
        )
        weights = vocabulary * width
        assert dense - packed == 2 * (2 * weights - (weights // 2 + 2 * weights // 128))  # a table, and a head


def test_more_samples_take_more_disk_and_not_more_memory(configurations):
    few, many = (planned(configurations["llava-1.5-7b"], samples=samples) for samples in (512, 2048))
    assert abs(many.peak.bytes - few.peak.bytes) < few.peak.bytes * 0.01
    waiting = parts(many, "calibrating")["hidden states"]
    assert waiting == 2**30
    on_disk = {part.name: part.bytes for part in many.disk[0].parts}["activations"]
    assert on_disk > many.activations - waiting
    assert many.activations == 4 * few.activations


def test_what_holds_the_whole_model_is_a_step_of_its_own(configurations):
    folder = configurations["llava-1.5-7b"]
    weighted = planned(folder, recipe={"options": {"token_weights": "modality"}})
    tuned = planned(folder, recipe={"method": "qvlm", "activations": {"bits": 6}})
    loaded, verified = planned(folder, gate=True), planned(folder, verify=True)
    steps = (weighted, "weighing"), (tuned, "tuning"), (loaded, "loading it"), (verified, "verifying")
    for plan, step in steps:
        assert 4 * plan.parameters in parts(plan, step).values()
    assert not any(4 * plan.parameters in parts(plan, need.step).values() for need in planned(folder).memory)


@pytest.mark.parametrize(
    ("offered", "formats", "said"),
    [
        ({"free_disk": 1000}, "safetensors", "quantizing needs 0.00 GB of disk (the journal"),
        ({"available_memory": 1000}, "safetensors", "GB of memory (Python and its libraries"),
    ],
)
def test_too_little_of_anything_is_refused_before_the_samples_are_read(
    offered, formats, said, tiny_folders, tmp_path, monkeypatch
):
    for name, count in offered.items():
        monkeypatch.setattr(machine, name, lambda *place, count=count: count)
    monkeypatch.setattr(pipeline.datas, "choose", lambda *arguments: pytest.fail("samples were read"))
    with pytest.raises(VlmqError) as refused:
        export(request(tiny_folders["blip2-opt"], tmp_path / "out", formats=formats))
    assert said in str(refused.value)
    assert "; " in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_cannot_be_is_refused_by_the_plan(configurations):
    folder = configurations["llava-llama"]
    with pytest.raises(VlmqError, match="64 columns do not divide into groups of 128"):
        planned(folder, recipe={"group_size": 128})
    with pytest.raises(VlmqError, match="needs at least one to be calibrated"):
        planned(folder, samples=0)


def test_the_command_prints_a_plan_for_people_and_for_programs(configurations, monkeypatch):
    arguments = ["plan", str(configurations["llava-1.5-7b"]), "--vision-bits", "8", "--connector-bits", "16"]
    shown = CliRunner().invoke(cli.app, [*arguments, "--no-verify"])
    assert "7,063.4 M parameters" in shown.output
    assert "working copies" in shown.output
    found = json.loads(CliRunner().invoke(cli.app, [*arguments, "--no-verify", "--json"]).output)
    assert [found["components"][name]["bits"] for name in ("vision", "connector", "language")] == [[8], [16], [4]]
    for need in (*found["memory"], *found["disk"]):
        assert need["bytes"] == sum(part["bytes"] for part in need["parts"])
    assert found["peak_memory"] == max(need["bytes"] for need in found["memory"])
    monkeypatch.setattr(machine, "available_memory", lambda: 24 * 10**9)
    refused = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert "loading it with transformers needs" in str(refused.exception)
    assert "pass --no-gate" in json.loads(refused.output)["refusals"][0]
    refused = CliRunner().invoke(cli.app, [*arguments, "--no-gate", "--json"])
    assert "verifying needs" in str(refused.exception)
    assert "pass --no-verify" in json.loads(refused.output)["refusals"][0]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/a/b", ".", ("memory.max", "memory.current", "inactive_file")),
        ("4:memory:/a/b", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_a_container_s_limit_bounds_the_memory_that_is_available(inside, line, folder, names, tmp_path, monkeypatch):
    """Inside a container the group of the process is mounted as the root of all groups."""
    limit, usage, cache = names
    groups = tmp_path / "cgroup"
    groups.write_text(f"3:cpu:/elsewhere\n{line}\n")
    place = tmp_path / "mount" / folder / ("" if inside else "a")  # a limit of the group above holds too
    place.mkdir(parents=True)
    (place / limit).write_text("1000000\n")
    (place / usage).write_text("700000\n")
    (place / "memory.stat").write_text(f"anon 1\n{cache} 50000\n")
    monkeypatch.setattr(machine, "resident", lambda: 20_000)
    assert machine.available_memory(groups, tmp_path / "mount") == 350_000 + 20_000


def test_without_a_limit_all_that_the_system_has_left_is_available(tmp_path, monkeypatch):
    groups = tmp_path / "cgroup"
    groups.write_text("0::/\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    monkeypatch.setattr(machine, "resident", lambda: 0)
    assert machine.available_memory(groups, tmp_path) > 10**8
    assert machine.free_disk(tmp_path / "not" / "yet") > 0
