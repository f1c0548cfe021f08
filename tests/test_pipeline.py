import json
from dataclasses import replace

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmq.exporter import pipeline, sources
from vlmq.exporter.asking import ask
from vlmq.exporter.calibration import prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import family_of
from vlmq.exporter.load import load
from vlmq.exporter.names import memory_names
from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.runtime import OnnxVlm, TorchVlm, open_processor
from vlmq.exporter.simulate import simulate
from vlmq.formats import compressed_tensors, manifest
from vlmq.formats.errors import FormatError
from vlmq.formats.onnx_weights import read_weights

FAMILIES = ("blip2-opt", "llava-llama")


def request(folder, output, pictures, **changes):
    recipe = make_recipe({"group_size": 32, **changes.pop("recipe", {})})
    made = Request(model=str(folder), output=output, recipe=recipe, calibration=str(pictures), samples=8, verify=False)
    return replace(made, **changes)


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tiny_folders, pictures, tmp_path_factory):
    """(variant, source folder, exported folder) with both formats."""
    source = tiny_folders[request.param]
    output = tmp_path_factory.mktemp("exports") / "out"
    export(globals()["request"](source, output, pictures))
    return request.param, source, output


def dequantized(source, folder):
    """The reference of an export: the source in float32, its quantized linears replaced by what is in the files."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        f"{name}.weight": compressed_tensors.unpack(name, tensors, entry.grid).dequantize()
        for name, entry in manifest.read(folder).tensors.items()
    }
    names = memory_names(tensors, model)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            if names[name] in state:
                state[names[name]].copy_(tensor)
    return model


def questions(variant, source, count=4):
    template = family_of(tiny.config(variant)).question
    asked = ["what is the colour of the circle?", "how many?", "is there a red square?", "describe"][:count]
    images = [Image.effect_noise((20, 20), 60 + 10 * index).convert("RGB") for index in range(count)]
    return images, [template.format(question) for question in asked]


def test_every_linear_is_in_the_manifest_as_quantized_or_as_kept(exported):
    variant, _source, folder = exported
    made = manifest.read(folder)
    model = tiny.tiny(variant)
    names = memory_names([*made.tensors, *made.kept], model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(names.values()) == linears
    assert not set(made.tensors) & set(made.kept)
    assert set(made.tensors) == {
        name.removesuffix(".weight_packed")
        for name in load_file(folder / "model.safetensors")
        if name.endswith(".weight_packed")
    }
    manifest.coverage(folder)


def test_transformers_loads_the_export_and_gives_the_dequantized_model_s_tokens(exported):
    variant, source, folder = exported
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images, prompts = questions(variant, source)
    inputs = AutoProcessor.from_pretrained(folder)(images=images, text=prompts, padding=True, return_tensors="pt")
    found = model.generate(**inputs, do_sample=False, max_new_tokens=8)  # before any forward
    expected = dequantized(source, folder).generate(**inputs, do_sample=False, max_new_tokens=8)
    assert torch.equal(found, expected)


def test_asking_about_a_picture_gives_the_same_answer_in_both_engines(exported, random_samples):
    _variant, _source, folder = exported
    image = random_samples[0].image
    for prompts in (["what is the colour of the circle?"], []):
        onnx, torch_ = (ask(folder, [image], prompts, engine, max_new_tokens=6) for engine in ("onnx", "torch"))
        assert onnx == torch_
        assert onnx[0].tokens


def test_onnxruntime_gives_the_dequantized_model_s_tokens(exported):
    variant, source, folder = exported
    images, prompts = questions(variant, source)
    found = OnnxVlm(folder).generate(images, prompts, 8)
    expected = TorchVlm(dequantized(source, folder), AutoProcessor.from_pretrained(source)).generate(images, prompts, 8)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]


def test_the_weights_in_onnx_are_those_in_safetensors_bit_for_bit(exported):
    variant, source, folder = exported
    state = dequantized(source, folder).state_dict()
    names = memory_names(manifest.read(folder).tensors, tiny.tiny(variant))
    graphs = {
        name: weight for file in sorted((folder / "onnx").glob("*.onnx")) for name, weight in read_weights(file).items()
    }
    assert set(graphs) == set(names.values())
    for name, weight in graphs.items():
        assert torch.equal(weight.dequantize(), state[f"{name}.weight"])


def test_what_is_written_is_what_was_solved_folds_included(exported, pictures):
    """Against the weights that the blocks had while they were calibrated, which never went through a file."""
    _variant, source, folder = exported
    samples = sources.read(pictures, 8).samples
    solved, _ = simulate(open_checkpoint(str(source)), make_recipe({"group_size": 32}), samples)
    written = dequantized(source, folder).state_dict()
    folded = 0
    for name, tensor in solved.state_dict().items():
        assert torch.equal(written[name], tensor), name
        folded += "norm" in name
    assert folded > 10


def test_what_was_neither_quantized_nor_folded_is_the_source_s_byte_for_byte(exported):
    _variant, source, folder = exported
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    sources = {entry.fold.split(" ")[0] for entry in manifest.read(folder).tensors.values() if entry.fold}
    same = [name for name in after if name in before and name.rpartition(".")[0] not in sources]
    assert len(same) > 10
    for name in same:
        assert torch.equal(before[name], after[name])
    assert {name for name in before if name not in after} == {
        f"{name}.weight" for name in manifest.read(folder).tensors
    }


def test_the_same_request_gives_the_same_bytes(tiny_folders, pictures, tmp_path):
    folders = []
    for name in ("one", "two"):
        done = export(request(tiny_folders["llava-mistral"], tmp_path / name, pictures))
        folders.append(
            {file.relative_to(done.folder): file.read_bytes() for file in done.folder.rglob("*") if file.is_file()}
        )
    assert folders[0].keys() == folders[1].keys()
    for name, content in folders[0].items():
        assert content == folders[1][name], name


def test_onnx_alone_holds_no_safetensors_and_answers(tiny_folders, pictures, tmp_path):
    done = export(request(tiny_folders["llava-qwen2"], tmp_path / "out", pictures, formats="onnx"))
    assert not list(done.folder.glob("*.safetensors"))
    assert "quantization_config" not in json.loads((done.folder / "config.json").read_text())
    manifest.coverage(done.folder)
    images, prompts = questions("llava-qwen2", None, 1)
    assert OnnxVlm(done.folder).generate(images, prompts, 4)[0].tokens


def test_safetensors_alone_holds_no_graphs(tiny_folders, pictures, tmp_path):
    done = export(request(tiny_folders["blip2-opt"], tmp_path / "out", pictures, formats="safetensors"))
    assert not (done.folder / "onnx").exists()


def test_rows_of_q_and_k_left_alone_are_written_dense_and_said_to_be(tiny_folders, pictures, tmp_path):
    done = export(
        request(tiny_folders["blip2-opt"], tmp_path / "out", pictures, formats="safetensors", recipe={"qkv": "v-only"})
    )
    made = manifest.coverage(done.folder)
    entry = made.tensors["vision_model.encoder.layers.0.self_attn.qkv"]
    assert entry.stored.startswith("dense")
    _model, info = AutoModelForImageTextToText.from_pretrained(done.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_method_that_looks_at_no_input_is_said_to_have_used_none(tiny_folders, tmp_path):
    recipe = make_recipe({"method": "rtn", "group_size": 32})
    made = Request(str(tiny_folders["blip2-opt"]), tmp_path / "out", recipe, formats="safetensors", verify=False)
    assert export(made).manifest.calibration is None


def test_an_export_that_fails_midway_leaves_nothing_but_its_journal(tiny_folders, pictures, tmp_path, monkeypatch):
    def fail(*args):
        raise VlmqError("somewhere: went wrong; try again")

    monkeypatch.setattr(pipeline, "_write_onnx", fail)
    with pytest.raises(VlmqError, match="went wrong"):
        export(request(tiny_folders["blip2-opt"], tmp_path / "out", pictures))
    assert [path.name for path in tmp_path.iterdir()] == [".out.journal"]


def test_an_output_folder_that_exists_is_left_as_it_is(tiny_folders, pictures, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("precious")
    with pytest.raises(FormatError, match="exists already"):
        export(request(tiny_folders["blip2-opt"], output, pictures))
    assert (output / "mine").read_text() == "precious"


def test_verifying_on_images_that_were_calibrated_on_is_refused(tiny_folders, pictures, tmp_path):
    with pytest.raises(VlmqError, match="was calibrated on"):
        export(request(tiny_folders["blip2-opt"], tmp_path / "out", pictures, verify=True, data=str(pictures)))
    assert list(tmp_path.iterdir()) == []


def test_too_few_samples_to_hold_any_out_is_said_before_the_work(tiny_folders, pictures, tmp_path):
    with pytest.raises(VlmqError, match="none is left to verify on; name a set with --data"):
        export(request(tiny_folders["blip2-opt"], tmp_path / "out", pictures, verify=True, samples=12))


PER_TENSOR = {"bits": 8, "group_size": "tensor"}
ROUNDED = {
    "smoothed": {"method": "smoothquant", "bits": 8, "activations": {"bits": 8}},
    "one range each": {"method": "rtn", "bits": 8, "group_size": "tensor", "activations": PER_TENSOR},
    "clamped": {"method": "qvlm", "activations": {"bits": 6, "symmetric": False}, "options": {"vision_tuning": False}},
    "rotated": {"method": "gptq", "rotate": ["language", "vision"], "activations": {"bits": 4, "group_size": 32}},
    "uniform": {"method": "uniform", "bits": 4, "options": {"biases": True}},
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("variant", ["blip2-opt", "llava-llama"])
@torch.no_grad()
def test_an_export_that_is_loaded_again_computes_what_was_solved(
    name, variant, tiny_folders, random_samples, pictures, tmp_path
):
    """Inputs rounded as in calibration, ranges and clamps included; against the solver's own model in memory."""
    content = {"group_size": 32, **ROUNDED[name]}
    if name == "uniform":
        del content["group_size"]
    made = make_recipe(content)
    asked = Request(
        str(tiny_folders[variant]), tmp_path / "out", made, formats="safetensors", verify=False,
        calibration=str(pictures), samples=8,
    )  # fmt: skip
    export(asked)
    checkpoint = open_checkpoint(str(tiny_folders[variant]))
    expected, _ = simulate(checkpoint, made, sources.read(str(pictures), 8).samples)
    found = load(tmp_path / "out")
    for batch in prepare(random_samples, open_processor(tiny_folders[variant]), checkpoint.family):
        torch.testing.assert_close(found(**batch).logits, expected(**batch).logits, rtol=1e-4, atol=1e-4)
