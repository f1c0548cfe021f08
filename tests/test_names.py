"""On-disk names become the names transformers has in memory, whoever wrote the file."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import VARIANTS, tiny, tiny_folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from vlmq.exporter.names import memory_name, memory_names
from vlmq.exporter.skeleton import skeleton

LLAVAS = [variant for variant in VARIANTS if variant.startswith("llava")]
# From the model in memory to the files of llava-hf on the Hub, as its model.safetensors.index.json has them.
HUB = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def hub_folder(variant: str, folder: Path) -> Path:
    """The tiny checkpoint under the names the Hub's LLaVA checkpoints have."""
    tiny_folder(variant, folder)
    names = tiny(variant).state_dict()
    tensors = load_file(folder / "model.safetensors")
    model = skeleton(AutoConfig.from_pretrained(folder))
    disk = {memory: disk for disk, memory in memory_names(tensors, model).items()}
    renamed = {}
    for name in names:
        prefix = next(prefix for prefix in HUB if name.startswith(prefix))
        renamed[HUB[prefix] + name.removeprefix(prefix)] = tensors[disk[name]]
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def names_on_disk(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def tied(model) -> set[str]:
    return set(model.all_tied_weights_keys) if model.config.get_text_config().tie_word_embeddings else set()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_names_of_a_saved_model_become_its_state_dict_keys(variant, tmp_path):
    folder = tiny_folder(variant, tmp_path / "model")
    model = skeleton(AutoConfig.from_pretrained(folder))
    mapped = memory_names(names_on_disk(folder), model).values()
    assert set(mapped) == set(tiny(variant).state_dict()) - tied(tiny(variant))


@pytest.mark.parametrize("variant", LLAVAS)
def test_the_names_on_the_hub_become_the_state_dict_keys(variant, tmp_path):
    folder = hub_folder(variant, tmp_path / "model")
    model = skeleton(AutoConfig.from_pretrained(folder))
    mapped = memory_names(names_on_disk(folder), model)
    assert "vision_tower.vision_model.pre_layrnorm.weight" in mapped
    assert set(mapped.values()) == set(tiny(variant).state_dict())


def test_transformers_loads_the_hub_named_folder_to_the_same_weights(tmp_path):
    folder = hub_folder("llava-llama", tmp_path / "model")
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    reference = tiny("llava-llama").half().state_dict()
    assert all(torch.equal(weight, reference[name]) for name, weight in loaded.state_dict().items())


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
def test_the_tensors_of_a_packed_weight_are_named_like_their_weight(part):
    model = skeleton(tiny("llava-llama").config)
    disk = f"language_model.model.layers.1.mlp.down_proj.{part}"
    assert memory_name(disk, model) == f"model.language_model.layers.1.mlp.down_proj.{part}"


def test_the_tensors_of_a_packed_weight_get_the_prefix_its_weight_gets():
    """A file of a bare language model, read into one with a head: transformers looks for the weight it knows."""
    text = tiny("llava-llama").config.text_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    assert memory_name("layers.0.mlp.up_proj.weight_packed", model) == "model.layers.0.mlp.up_proj.weight_packed"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_name_that_is_right_already_stays(variant):
    model = skeleton(tiny(variant).config)
    names = list(tiny(variant).state_dict())
    assert memory_names(names, model) == {name: name for name in names}


def test_a_module_is_renamed_like_its_tensors():
    model = skeleton(tiny("llava-llama").config)
    assert memory_name("language_model.lm_head", model) == "lm_head"
    assert memory_name("vision_tower.vision_model.encoder.layers.0.mlp.fc1", model) == (
        "model.vision_tower.encoder.layers.0.mlp.fc1"
    )
