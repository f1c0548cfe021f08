"""Processors as older checkpoints have them: without what transformers needs to give an image its place."""

import json
import shutil

import pytest
import tiny
from PIL import Image

from vlmq.exporter.calibration import prepare
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import family_of
from vlmq.exporter.runtime import open_processor
from vlmq.exporter.samples import Sample

LEFT_OUT = ("num_query_tokens", "patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


@pytest.fixture
def old(tiny_folders, variant, tmp_path):
    """The checkpoint with a processor that lacks all of LEFT_OUT, and a tokenizer without padding."""
    folder = shutil.copytree(tiny_folders[variant], tmp_path / "old")
    processor = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({k: v for k, v in processor.items() if k not in LEFT_OUT}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in tokenizer.items() if k != "pad_token"}))
    return folder


def test_what_an_old_processor_leaves_out_comes_from_the_config(old, variant):
    image = Image.effect_noise((20, 20), 80).convert("RGB")
    text = family_of(tiny.config(variant)).question.format("how many?")
    found, expected = (
        made(images=[image], text=[text], return_tensors="pt")
        for made in (open_processor(old), tiny.processor(variant))
    )
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
    assert open_processor(old).tokenizer.pad_token is not None


def test_a_prompt_without_a_place_for_its_image_is_refused(random_samples):
    """BLIP-2 drops image features that have no place without a word: it would be calibrated on text alone."""
    processor = tiny.processor("blip2-opt")
    processor.num_query_tokens = None
    with pytest.raises(VlmqError, match="has no place for the image"):
        prepare(random_samples, processor, family_of(tiny.config("blip2-opt")))


def test_a_folder_without_a_processor_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(VlmqError, match="no usable tokenizer and image processor") as refused:
        open_processor(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_prompt_alone_needs_no_place(tiny_folders):
    processor = open_processor(tiny_folders["llava-llama"])
    assert prepare([Sample("1", None, "question", "how many?")], processor, family_of(tiny.config("llava-llama")))
