"""An exported folder is the same model to every reader: our `load`, transformers' `from_pretrained`, the reference."""

import contextlib
import json
import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import inputs, packed_folder, reference, rounded_reference
from safetensors.torch import load_file, save_file
from tiny import VARIANTS, forward_inputs, tiny, tiny_folder
from torch import nn
from transformers import AutoModelForImageTextToText

from vlmq.exporter.load import load
from vlmq.exporter.names import memory_names
from vlmq.exporter.skeleton import skeleton
from vlmq.formats import compressed_tensors, manifest
from vlmq.formats.errors import FormatError
from vlmq.kernels.grid import ROW, TENSOR, Grid, Limits, QuantizedWeight
from vlmq.kernels.linear import QuantizedLinear


def everything(grid: Grid):
    return lambda name: grid


def mixed(name: str) -> Grid | None:
    """Eight bits for the eyes, four for the language, three in one layer of it, the connector as it was."""
    if "vision" in name:
        return Grid(8, ROW)
    if "qformer" in name or "projector" in name:
        return None
    return Grid(3, 32) if "layers.1" in name else Grid(4, 64)


def mixed_asymmetric(name: str) -> Grid | None:
    grid = mixed(name)
    return grid and Grid(grid.bits, grid.group, symmetric="vision" in name)


def generated(model: Any, variant: str) -> list[int]:
    return model.generate(**inputs(variant), max_new_tokens=8, do_sample=False)[0].tolist()


@torch.no_grad()
def logits(model: nn.Module, variant: str) -> torch.Tensor:
    return model(**forward_inputs(variant, inputs(variant))).logits


def equals_reference(model: nn.Module, variant: str, weights: dict[str, QuantizedWeight]) -> bool:
    """Bit for bit, in the precision the reader multiplies in: transformers 5.23 in the scales' own."""
    found = logits(model, variant)
    return any(
        torch.equal(found, logits(reference(variant, weights, rounded=rounded), variant)) for rounded in (True, False)
    )


@contextlib.contextmanager
def quiet():
    """compressed-tensors draws its bars whatever transformers is told."""
    with contextlib.redirect_stderr(StringIO()):
        yield


def by_transformers(folder: Path) -> nn.Module:
    with quiet():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not {key: names for key, names in info.items() if names}
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "choose",
    [everything(Grid(4, 32, symmetric=False)), mixed, mixed_asymmetric],
    ids=["one grid", "mixed", "mixed asymmetric"],
)
def test_a_loaded_export_answers_as_the_dequantized_reference(variant, choose, tmp_path):
    weights = packed_folder(variant, tmp_path / "out", choose)
    expected = reference(variant, weights)
    model = load(tmp_path / "out")
    assert generated(model, variant) == generated(expected, variant)
    assert torch.equal(logits(model, variant), logits(expected, variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_answers_as_the_dequantized_reference_generating_first(variant, symmetric, tmp_path):
    weights = packed_folder(variant, tmp_path / "out", everything(Grid(4, 32, symmetric)))
    model = by_transformers(tmp_path / "out")
    assert generated(model, variant) == generated(reference(variant, weights), variant)
    assert equals_reference(model, variant, weights)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
@pytest.mark.parametrize("group", [64, ROW])
def test_transformers_reads_every_number_of_bits(bits, group, tmp_path):
    weights = packed_folder("blip2-opt", tmp_path / "out", everything(Grid(bits, group, symmetric=group == 64)))
    assert equals_reference(by_transformers(tmp_path / "out"), "blip2-opt", weights)


@pytest.mark.parametrize("variant", ["blip2-opt", "llava-llama"])
def test_transformers_reads_mixed_symmetric_grids_once_called(variant, tmp_path):
    """The first forward unpacks; `caveat` tells people so. Then it computes in float32, exactly as the reference."""
    weights = packed_folder(variant, tmp_path / "out", mixed)
    expected = reference(variant, weights)
    model = by_transformers(tmp_path / "out")
    with quiet():
        assert torch.equal(logits(model, variant), logits(expected, variant))
    assert generated(model, variant) == generated(expected, variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_keep_the_dtype_of_the_source(dtype, tmp_path):
    weights = packed_folder("llava-llama", tmp_path / "out", everything(Grid(4, 32)), dtype=dtype)
    assert next(iter(weights.values())).scale.dtype == dtype
    expected = reference("llava-llama", weights, stored=dtype)
    assert torch.equal(logits(load(tmp_path / "out"), "llava-llama"), logits(expected, "llava-llama"))
    if dtype == torch.float32:
        assert torch.equal(logits(by_transformers(tmp_path / "out"), "llava-llama"), logits(expected, "llava-llama"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["blip2-opt", "blip2-t5", "llava-llama"])
def test_a_16_bit_model_has_the_dtypes_transformers_gives_it_and_runs(variant, dtype, tmp_path):
    weights = packed_folder(variant, tmp_path / "out", everything(Grid(4, 32)), dtype=torch.bfloat16)
    model = load(tmp_path / "out", dtype)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out.source", dtype=dtype)
    dtypes = {name: tensor.dtype for name, tensor in theirs.state_dict().items()}
    ours = model.state_dict()
    assert {name: ours[name].dtype for name in dtypes.keys() & ours.keys()} == {
        name: dtypes[name] for name in dtypes.keys() & ours.keys()
    }
    expected = logits(reference(variant, weights, stored=torch.bfloat16), variant)
    assert torch.nn.functional.cosine_similarity(logits(model, variant).float(), expected, dim=-1).min() > 0.999


def test_loading_never_makes_a_quantized_weight_dense(tmp_path, monkeypatch):
    weights = packed_folder("blip2-opt", tmp_path / "out", everything(Grid(4, 32)))

    def refuse(weight: QuantizedWeight) -> torch.Tensor:
        raise AssertionError("a full-precision weight was made")

    monkeypatch.setattr(QuantizedWeight, "dequantize", refuse)
    model = load(tmp_path / "out")
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert quantized == set(weights)
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linears == ["language_model.lm_head"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loaded_weights_are_bit_for_bit_those_that_were_packed(variant, tmp_path):
    weights = packed_folder(variant, tmp_path / "out", mixed_asymmetric)
    model = load(tmp_path / "out")
    for name, weight in weights.items():
        found = model.get_submodule(name).quantized()
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scale, weight.scale)
        assert torch.equal(found.zero, weight.zero)


@pytest.mark.parametrize("variant", VARIANTS)
def test_buffers_that_no_file_holds_have_their_values(variant, tmp_path):
    expected = dict(tiny(variant).named_buffers())
    assert expected or variant.startswith("blip2")  # which have none
    empty = skeleton(tiny(variant).config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    found = dict(empty.named_buffers())
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], buffer) and found[name].dtype == buffer.dtype for name, buffer in expected.items()
    )


def test_tied_weights_stay_one_tensor(tmp_path):
    empty = skeleton(tiny("blip2-opt").config).language_model
    assert empty.lm_head.weight is empty.model.decoder.embed_tokens.weight
    packed_folder("blip2-opt", tmp_path / "out", everything(Grid(4, 32)))
    language = load(tmp_path / "out").language_model
    assert language.lm_head.weight is language.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unquantized_folder_loads_as_transformers_loads_it(variant, tmp_path):
    folder = tiny_folder(variant, tmp_path / "model")
    assert torch.equal(logits(load(folder), variant), logits(reference(variant, {}), variant))


def test_the_generation_config_comes_along(tmp_path):
    packed_folder("llava-llama", tmp_path / "out", everything(Grid(4, 32)))
    assert load(tmp_path / "out").generation_config.max_new_tokens == 8


def test_names_of_the_hub_load_to_the_same_model(tmp_path):
    """LLaVA as the Hub has it, quantized: on-disk names differ from those that config.json's targets mean."""
    folder = tmp_path / "out"
    weights = packed_folder("llava-llama", folder, mixed)
    tensors = load_file(folder / "model.safetensors")
    names = memory_names(tensors, tiny("llava-llama"))
    assert any(name.startswith("vision_tower.encoder") for name in names)
    save_file(
        {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "vlmq.json").unlink()
    expected = logits(reference("llava-llama", weights), "llava-llama")
    assert torch.equal(logits(load(folder), "llava-llama"), expected)
    with quiet():
        assert torch.equal(logits(by_transformers(folder), "llava-llama"), expected)


def test_sharded_files_load_to_the_same_model(tmp_path):
    weights = packed_folder("llava-qwen2", tmp_path / "out", mixed, max_shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    expected = logits(reference("llava-qwen2", weights), "llava-qwen2")
    assert torch.equal(logits(load(tmp_path / "out"), "llava-qwen2"), expected)
    with quiet():
        assert torch.equal(logits(by_transformers(tmp_path / "out"), "llava-qwen2"), expected)


FC1 = "vision_model.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{FC1}.weight_scale"), f"{FC1}.weight_scale: absent"),
        (lambda tensors: tensors.pop(f"{FC1}.bias"), f"{FC1}.bias: absent"),
        (lambda tensors: tensors.pop("query_tokens"), "query_tokens absent"),
        (lambda tensors: tensors.update(stray=torch.zeros(1)), "stray not part of the model"),
        (lambda tensors: tensors.update(query_tokens=torch.zeros(1, 2, 64)), "query_tokens has shape (1, 2, 64)"),
    ],
)
def test_a_folder_whose_tensors_are_not_the_models_is_refused(change, message, tmp_path):
    packed_folder("blip2-opt", tmp_path / "out", everything(Grid(4, 32)))
    tensors = load_file(tmp_path / "out/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError) as refused:
        load(tmp_path / "out")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


W8A8_PER_TOKEN = (Grid(8, ROW), Grid(8, ROW), None)
W8A8_PER_TENSOR = (Grid(8, TENSOR), Grid(8, TENSOR), Limits(-3.0, 3.0))
W4A4_GROUPED = (Grid(4, 32), Grid(4, 32, symmetric=False), None)
ROUNDED = {
    "W8A8 per token": W8A8_PER_TOKEN,
    "W8A8 per token, asymmetric": (Grid(8, ROW, symmetric=False), Grid(8, ROW, symmetric=False), None),
    "W8A8 per tensor": W8A8_PER_TENSOR,
    "W8A8 per tensor, asymmetric": (Grid(8, TENSOR, False), Grid(8, TENSOR, symmetric=False), Limits(-0.1, 1 / 3)),
    "W4A4 grouped": W4A4_GROUPED,
    "W4A4 clamped": (Grid(4, 32), Grid(4, ROW, symmetric=False), Limits(-0.9, 1.3)),
}


@pytest.mark.parametrize("variant", ["blip2-opt", "llava-llama"])
@pytest.mark.parametrize(("weight", "to", "limits"), ROUNDED.values(), ids=ROUNDED)
def test_inputs_are_rounded_as_the_textbook_rounds_them(variant, weight, to, limits, tmp_path):
    weights = packed_folder(variant, tmp_path / "out", everything(weight), inputs=to, limits=limits)
    model = load(tmp_path / "out")
    expected = rounded_reference(variant, weights, to, limits)
    assert torch.equal(logits(model, variant), logits(expected, variant))
    assert not torch.equal(logits(model, variant), logits(reference(variant, weights), variant))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert {(module.grid, module.inputs, module.limits) for module in linears.values()} == {(weight.stored, to, limits)}


@pytest.mark.parametrize("variant", ["blip2-opt", "llava-llama"])
def test_transformers_rounds_inputs_to_the_range_that_we_store_exactly_as_we_do(variant, tmp_path):
    """Where they are within the limits; it lets those below reach one level more."""
    weight, to, limits = Grid(8, TENSOR), Grid(8, TENSOR), Limits(-20.0, 20.0)
    weights = packed_folder(variant, tmp_path / "out", everything(weight), inputs=to, limits=limits)
    model = by_transformers(tmp_path / "out")
    with quiet():
        assert torch.equal(logits(model, variant), logits(rounded_reference(variant, weights, to, limits), variant))


@pytest.mark.parametrize(("weight", "to"), [(Grid(8, ROW), Grid(8, ROW, symmetric=False)), W4A4_GROUPED[:2]], ids=str)
def test_transformers_rounds_inputs_as_they_come_nearly_as_we_do(weight, to, tmp_path):
    """It rounds zeros and codes at other places of the formula: a value halfway between two levels may differ."""
    weights = packed_folder("llava-llama", tmp_path / "out", everything(weight), inputs=to)
    model = by_transformers(tmp_path / "out")
    with quiet():
        found = logits(model, "llava-llama")
    exact = logits(reference("llava-llama", weights), "llava-llama")
    rounding = (logits(rounded_reference("llava-llama", weights, to), "llava-llama") - exact).norm()
    assert (found - logits(load(tmp_path / "out"), "llava-llama")).norm() < 0.1 * rounding


def test_transformers_rounds_no_inputs_of_asymmetric_weights(tmp_path):
    """As `caveat` says; it would not load the weights otherwise."""
    grid = Grid(4, 32, symmetric=False)
    weights = packed_folder("llava-llama", tmp_path / "out", everything(grid), inputs=Grid(8, ROW))
    assert equals_reference(by_transformers(tmp_path / "out"), "llava-llama", weights)
    note = compressed_tensors.caveat({"a": compressed_tensors.Grids(grid, Grid(8, ROW))})
    assert note
    assert "rounds no inputs" in note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors[f"{FC1}.input_scale"].mul_(2), f"{FC1}.input_scale: not what the limits"),
        (lambda tensors: tensors.pop(f"{FC1}.input_scale"), f"{FC1}.input_scale: absent"),
        (
            lambda tensors: tensors.update({f"{FC1}.input_zero_point": torch.zeros(1, dtype=torch.int8)}),
            f"{FC1}.input_zero_point: not expected",
        ),
    ],
)
def test_a_stored_range_that_is_not_what_its_limits_give_is_refused(change, message, tmp_path):
    weight, to, limits = W8A8_PER_TENSOR
    packed_folder("blip2-opt", tmp_path / "out", everything(weight), inputs=to, limits=limits)
    tensors = load_file(tmp_path / "out/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=re.escape(message)):
        load(tmp_path / "out")


def test_without_the_manifest_a_range_is_refused_and_what_comes_with_the_input_is_not(tmp_path):
    for name, (weight, to, limits) in (("token", W8A8_PER_TOKEN), ("tensor", W8A8_PER_TENSOR)):
        packed_folder("llava-llama", tmp_path / name, everything(weight), inputs=to, limits=limits)
    expected = logits(load(tmp_path / "token"), "llava-llama")
    for name in ("token", "tensor"):
        (tmp_path / name / "vlmq.json").unlink()
    assert torch.equal(logits(load(tmp_path / "token"), "llava-llama"), expected)
    with pytest.raises(FormatError, match=r"vlmq\.json: absent, but has the limits of .*; fetch"):
        load(tmp_path / "tensor")


def test_a_manifest_with_other_inputs_than_the_config_is_refused(tmp_path):
    packed_folder("llava-llama", tmp_path / "out", everything(Grid(8, ROW)), inputs=Grid(8, ROW))
    made = manifest.read(tmp_path / "out")
    records = {name: entry.model_copy(update={"inputs": None}) for name, entry in made.tensors.items()}
    manifest.write(tmp_path / "out", made.model_copy(update={"tensors": records}))
    with pytest.raises(FormatError, match=r"vlmq\.json says .*inputs=None.*config\.json .*inputs=Grid\(bits=8"):
        load(tmp_path / "out")


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_with_one_scale_loads_as_rows_everywhere(symmetric, tmp_path):
    weights = packed_folder("blip2-opt", tmp_path / "out", everything(Grid(8, TENSOR, symmetric)))
    model = load(tmp_path / "out")
    for name, weight in weights.items():
        found = model.get_submodule(name).quantized()
        assert found.grid == Grid(8, ROW, symmetric)
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scale, weight.scale)
    assert equals_reference(by_transformers(tmp_path / "out"), "blip2-opt", weights)


def test_a_config_that_disagrees_with_the_manifest_is_refused(tmp_path):
    packed_folder("blip2-opt", tmp_path / "out", everything(Grid(4, 32)))
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"vlmq\.json says .*group=32"):
        load(tmp_path / "out")


def test_a_folder_of_pickles_alone_is_refused(tmp_path):
    folder = tiny_folder("llava-llama", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match="no safetensors there; convert"):
        load(folder)


def test_no_folder_is_refused_in_one_line(tmp_path):
    with pytest.raises(FormatError, match="no config"):
        load(tmp_path / "nowhere")


def test_loading_needs_no_compressed_tensors(tmp_path, monkeypatch):
    packed_folder("llava-llama", tmp_path / "out", everything(Grid(4, 32)))
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert generated(load(tmp_path / "out"), "llava-llama")
