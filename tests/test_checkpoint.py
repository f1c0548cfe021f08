import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlmq.exporter.checkpoint import open_checkpoint, release
from vlmq.exporter.errors import VlmqError
from vlmq.formats.errors import FormatError
from vlmq.formats.shards import headers


@pytest.fixture
def copy(tiny_folders, tmp_path):
    return shutil.copytree(tiny_folders["llava-llama"], tmp_path / "model")


def test_a_checkpoint_reads_the_weights_that_were_saved(variant, tiny_folders):
    checkpoint = open_checkpoint(str(tiny_folders[variant]))
    state = tiny.tiny(variant).half().state_dict()
    assert set(checkpoint.places) <= set(state)
    for name in checkpoint.places:
        assert torch.equal(checkpoint.read(name), state[name])
        assert checkpoint.dtype(name) == torch.float16


def test_a_sharded_checkpoint_reads_like_a_whole_one(copy):
    whole = open_checkpoint(str(copy))
    expected = {name: whole.read(name) for name in whole.places}
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, copy / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = open_checkpoint(str(copy))
    assert {place.file.name for place in sharded.places.values()} == set(shards)
    for name, tensor in expected.items():
        assert torch.equal(sharded.read(name), tensor)


def test_opening_a_checkpoint_reads_no_weight(tiny_folders):
    model = open_checkpoint(str(tiny_folders["blip2-opt"])).skeleton()
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_filled_module_can_be_released_again(tiny_folders):
    checkpoint = open_checkpoint(str(tiny_folders["blip2-opt"]))
    model = checkpoint.skeleton()
    name = "vision_model.encoder.layers.0"
    block = model.get_submodule(name)
    checkpoint.fill(block, name)
    assert torch.equal(block.mlp.fc1.weight.half(), checkpoint.read(f"{name}.mlp.fc1.weight"))
    assert model.get_submodule("vision_model.encoder.layers.1").mlp.fc1.weight.is_meta
    release(block)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_whole_model_in_memory_is_the_one_that_transformers_reads(variant, tiny_folders):
    folder = tiny_folders[variant]
    model = open_checkpoint(str(folder)).model()
    expected = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert not model.training
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == (variant == "blip2-opt")
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_no_such_model_says_what_can_be_named():
    with pytest.raises(VlmqError, match=r"no such folder and no such Hub model; name a folder, .*blip2-mini"):
        open_checkpoint("./nothing-here")


def test_a_hub_model_without_a_network_is_one_line():
    with pytest.raises(VlmqError, match="user/name: not a folder here, and the Hub cannot be reached"):
        open_checkpoint("user/name")


def test_a_checkpoint_of_pickles_alone_is_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(VlmqError, match=r"only a pickle \(pytorch_model.bin\)"):
        open_checkpoint(str(copy))


def test_a_truncated_shard_is_found_when_it_is_opened(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(VlmqError, match=r"model.safetensors: not a whole safetensors file .*; get it again"):
        open_checkpoint(str(copy))


def test_a_checkpoint_that_lacks_a_tensor_is_refused_before_any_work(copy):
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("input_layernorm.weight"))
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, copy / "model.safetensors")
    with pytest.raises(VlmqError, match=r"input_layernorm\.weight and 0 more tensors are absent"):
        open_checkpoint(str(copy))


def test_a_configuration_and_an_index_without_shards_are_enough_to_inspect(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert open_checkpoint(str(copy), weights=False).places == {}


def test_other_safetensors_beside_a_checkpoint_are_not_part_of_it(copy):
    save_file({"adapter": torch.zeros(1)}, copy / "adapter_model.safetensors")
    places = open_checkpoint(str(copy)).places
    assert {place.file.name for place in places.values()} == {"model.safetensors"}
    assert "adapter" not in headers(copy)


def test_a_tower_of_which_several_layers_are_read_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vision_feature_layer": [-2, -3]}))
    with pytest.raises(VlmqError, match="reads several layers; one is supported"):
        open_checkpoint(str(copy))


def test_a_missing_shard_is_named(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}})
    )
    with pytest.raises(FormatError, match=r"gone\.safetensors: the shard is missing"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "'llama' is not a vision-language model"),
        ({"model_type": "no-such-thing"}, "config.json"),
        ({"model_type": "llava", "quantization_config": {}}, "quantized already"),
    ],
)
def test_a_folder_that_holds_no_vision_language_model_is_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VlmqError, match=message):
        open_checkpoint(str(tmp_path))


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(VlmqError, match=r"has no config\.json"):
        open_checkpoint(str(tmp_path))
