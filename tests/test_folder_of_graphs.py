"""The ONNX folder has what transformers.js and onnxruntime-genai look for, and Python reads it as before."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
from graphs import exported
from pictures import pictures, prompts
from tiny import VARIANTS, config
from transformers import AutoConfig, AutoProcessor

from vlmq.exporter.runtime import OnnxVlm, open_processor
from vlmq.formats import genai, transformers_js

IMAGE = 4


@pytest.fixture
def merging(completed):
    """`completed`, where onnxruntime-genai can be told of it."""
    if completed[0] == "blip2-t5":
        pytest.skip("onnxruntime-genai has no encoder-decoder with images")
    return completed


@pytest.fixture(scope="module", params=VARIANTS)
def completed(request, tmp_path_factory):
    """(variant, folder as graphs were written, the same completed)"""
    made = exported(request.param)
    folder = shutil.copytree(made.folder, tmp_path_factory.mktemp("completed") / "out")
    genai.write(folder, made.packed.config)
    transformers_js.complete(folder)
    return request.param, made.folder, folder


def test_the_merging_graph_puts_features_where_the_image_tokens_are(merging):
    _, _, folder = merging
    (path,) = (folder / "onnx").glob("embed_merge*.onnx")
    merge = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (plain,) = (folder / "onnx").glob("embed_tokens*.onnx")
    embed = onnxruntime.InferenceSession(plain, providers=["CPUExecutionProvider"])
    tokens = np.array([[7, IMAGE, IMAGE, 9, 3], [IMAGE, 8, IMAGE, 2, 2]], dtype=np.int64)
    expected = embed.run(None, {"input_ids": tokens})[0]
    features = np.random.default_rng(0).normal(size=(2, 2, expected.shape[-1])).astype(np.float32)
    expected[tokens == IMAGE] = features.reshape(4, -1)
    assert np.array_equal(merge.run(None, {"input_ids": tokens, "image_features": features})[0], expected)


def test_the_merging_graph_embeds_text_alone(merging):
    _, _, folder = merging
    (path,) = (folder / "onnx").glob("embed_merge*.onnx")
    merge = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (plain,) = (folder / "onnx").glob("embed_tokens*.onnx")
    embed = onnxruntime.InferenceSession(plain, providers=["CPUExecutionProvider"])
    tokens = np.array([[7, 9, 3]], dtype=np.int64)
    expected = embed.run(None, {"input_ids": tokens})[0]
    none = np.zeros((0, 0, expected.shape[-1]), dtype=np.float32)
    assert np.array_equal(merge.run(None, {"input_ids": tokens, "image_features": none})[0], expected)


def test_the_merging_graph_has_no_table_of_its_own(merging):
    _, _, folder = merging
    (path,) = (folder / "onnx").glob("embed_merge*.onnx")
    assert not path.with_name(f"{path.name}_data").exists()
    assert path.stat().st_size < 8192


def test_genai_config_names_files_that_are_there_and_the_decoder_s_inputs(merging):
    _, _, folder = merging
    described = json.loads((folder / "genai_config.json").read_text())["model"]
    for part in ("vision", "embedding", "decoder"):
        session = onnxruntime.InferenceSession(folder / described[part]["filename"], providers=["CPUExecutionProvider"])
        there = {slot.name for slot in session.get_inputs()}
        layers = range(described["decoder"]["num_hidden_layers"])
        named = described[part]["inputs"].values()
        assert there == {name.replace("%d", str(layer)) for name in named for layer in layers}
    slot = next(slot for slot in session.get_inputs() if slot.name == "past_key_values.0.key")
    assert slot.shape[1] == described["decoder"]["num_key_value_heads"]
    assert slot.shape[3] == described["decoder"]["head_size"]


def test_genai_is_told_nothing_of_an_encoder_decoder(completed):
    variant, _, folder = completed
    assert (variant == "blip2-t5") == (not (folder / genai.CONFIG).exists())


def test_transformers_js_is_told_the_precision_and_the_data_beside(completed):
    _, _, folder = completed
    told = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert told["dtype"] == "q4"
    assert told["use_external_data_format"] == {
        path.name.removesuffix("_data"): 1 for path in (folder / "onnx").glob("*.onnx_data")
    }


def test_transformers_js_counts_as_many_image_tokens_as_there_are_features(completed):
    variant, _, folder = completed
    if not variant.startswith("llava"):
        pytest.skip("transformers.js knows no BLIP-2")
    told = json.loads((folder / "processor_config.json").read_text())
    images = json.loads((folder / "preprocessor_config.json").read_text())
    side = images["crop_size"]["height"] // told["patch_size"]
    counted = side * side + told["num_additional_image_tokens"]  # processing_llava.js
    assert counted == OnnxVlm(folder).image_features(pictures()[:1]).shape[1]
    assert images["processor_class"] == "LlavaProcessor"


@pytest.mark.parametrize("opened", [AutoProcessor.from_pretrained, open_processor])
def test_python_reads_the_same_tokens_and_pixels_as_before(completed, opened):
    variant, before, after = completed
    one, other = (
        opened(folder)(images=pictures()[:1], text=prompts(variant)[:1], return_tensors="np")
        for folder in (before, after)
    )
    assert np.array_equal(one["input_ids"], other["input_ids"])
    assert np.array_equal(one["pixel_values"], other["pixel_values"])


def test_python_reads_the_same_configuration_as_before(completed):
    variant, _, folder = completed
    found = AutoConfig.from_pretrained(folder)
    assert type(found) is type(config(variant))
    assert found.text_config.to_dict() == AutoConfig.from_pretrained(exported(variant).folder).text_config.to_dict()
