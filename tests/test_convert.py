"""A converted export is the same model: the same codes, scales and zeros, in the words another reader takes."""

import json
from pathlib import Path

import pytest
import torch
from packed import inputs, packed_folder, reference
from safetensors.torch import load_file, save_file
from test_names import HUB
from tiny import DECODERS, forward_inputs
from transformers import AutoModelForImageTextToText

from vlmq.exporter.convert import convert
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.load import load
from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.recipe import make_recipe
from vlmq.formats import manifest
from vlmq.formats.errors import FormatError
from vlmq.kernels.grid import ROW, TENSOR, Grid, Limits

OTHERS = ("awq", "gptq", "gptq-v2")


def but_qformer(grid: Grid):
    return lambda name: None if "qformer" in name else grid


def language(grid: Grid):
    return lambda name: grid if "language_model" in name else None


def mixed(name: str) -> Grid | None:
    if "vision" in name:
        return Grid(8, ROW)
    return Grid(4, 32, symmetric=False) if "language_model" in name else None


def same_tensors(one: Path, other: Path) -> bool:
    """Names, dtypes, shapes and bytes."""
    first, second = (
        {
            name: (tensor.dtype, tuple(tensor.shape), tensor.flatten().view(torch.uint8).tolist())
            for file in folder.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in (one, other)
    )
    return first == second


@torch.no_grad()
def logits(model: torch.nn.Module, variant: str) -> torch.Tensor:
    return model(**forward_inputs(variant, inputs(variant))).logits


@pytest.mark.parametrize("variant", DECODERS)
@pytest.mark.parametrize("to", OTHERS)
def test_there_and_back_is_the_same_to_the_byte_and_answers_alike_on_the_way(variant, to, tmp_path):
    here, there, back = tmp_path / "here", tmp_path / "there", tmp_path / "back"
    weights = packed_folder(variant, here, but_qformer(Grid(4, 32, symmetric=to == "gptq")))
    convert(here, to, there)
    assert not same_tensors(here, there)
    assert manifest.coverage(there)
    model = load(there)
    assert torch.equal(logits(model, variant), logits(reference(variant, weights), variant))
    for name, weight in weights.items():
        found = model.get_submodule(name).quantized()
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scale, weight.scale)
        assert torch.equal(found.zero, weight.zero)
    convert(there, "compressed-tensors", back)
    assert same_tensors(here, back)
    assert (back / "config.json").read_bytes() == (here / "config.json").read_bytes()
    assert manifest.read(back).tensors == manifest.read(here).tensors


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gptq_holds_other_bits_and_rows(bits, tmp_path):
    weights = packed_folder("llava-llama", tmp_path / "here", language(Grid(bits, 32 if bits == 3 else ROW)))
    convert(tmp_path / "here", "gptq", tmp_path / "there")
    assert torch.equal(
        logits(load(tmp_path / "there"), "llava-llama"), logits(reference("llava-llama", weights), "llava-llama")
    )


def test_a_way_through_every_layout_ends_where_a_straight_one_does(tmp_path):
    packed_folder("llava-qwen2", tmp_path / "start", language(Grid(4, ROW)))
    for before, to in zip(("start", *OTHERS), OTHERS, strict=False):
        convert(tmp_path / before, to, tmp_path / to)
        if before != "start":
            convert(tmp_path / "start", to, tmp_path / f"{to}-straight")
            assert same_tensors(tmp_path / to, tmp_path / f"{to}-straight")
            assert (tmp_path / to / "config.json").read_bytes() == (
                tmp_path / f"{to}-straight" / "config.json"
            ).read_bytes()


def test_gptq_holds_several_grids_and_awq_does_not(tmp_path):
    weights = packed_folder("llava-mistral", tmp_path / "here", mixed)
    done = convert(tmp_path / "here", "gptq-v2", tmp_path / "there")
    assert "loads anything else wrongly" in str(done.note)
    expected = logits(reference("llava-mistral", weights), "llava-mistral")
    assert torch.equal(logits(load(tmp_path / "there"), "llava-mistral"), expected)
    convert(tmp_path / "there", "compressed-tensors", tmp_path / "back")
    assert same_tensors(tmp_path / "here", tmp_path / "back")
    with pytest.raises(FormatError, match=r"vision_tower.* 8 bits, awq has 4; choose compressed-tensors"):
        convert(tmp_path / "here", "awq", tmp_path / "refused")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_get_the_dtype_of_the_export_back(dtype, tmp_path):
    """float16 holds bfloat16's from 2**-17 to 65280; of float32's hardly any."""
    here, there, back = tmp_path / "here", tmp_path / "there", tmp_path / "back"
    packed_folder("llava-llama", here, language(Grid(4, 64)), dtype=dtype)
    if dtype == torch.float32:
        with pytest.raises(FormatError, match=r"which does not hold these float32 ones exactly; choose"):
            convert(here, "awq", there)
        assert not there.exists()
        return
    convert(here, "awq", there)
    assert {entry.scales for entry in manifest.read(there).tensors.values()} == {"bfloat16"}
    convert(there, "gptq-v2", tmp_path / "on")
    convert(tmp_path / "on", "compressed-tensors", back)
    assert same_tensors(here, back)
    assert manifest.read(back).tensors == manifest.read(here).tensors


def test_what_is_not_packed_is_copied_and_the_manifest_says_what_the_files_have(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    packed_folder("llava-llama", here, language(Grid(4, 32)))
    (here / "onnx").mkdir()
    (here / "onnx" / "graph.onnx").write_bytes(b"graph")
    made = manifest.read(here)
    manifest.write(here, made.model_copy(update={"files": manifest.describe(here)}))
    done = convert(here, "awq", there).manifest
    for name in {"onnx/graph.onnx", *made.files} - {"config.json", "model.safetensors"}:
        assert (there / name).read_bytes() == (here / name).read_bytes()
    before, after = load_file(here / "model.safetensors"), load_file(there / "model.safetensors")
    untouched = {name for name in before if "language_model" not in name or "norm" in name}
    assert len(untouched) > 50
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    packed = [name for name in after if name.endswith(("qweight", "qzeros", "scales"))]
    assert sum(entry.bytes for entry in done.tensors.values()) == sum(after[name].nbytes for name in packed)
    assert {name: entry.sha256 for name, entry in done.tensors.items()} == {
        name: entry.sha256 for name, entry in made.tensors.items()
    }


def test_names_of_the_hub_stay_and_are_named_in_both_forms(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    weights = packed_folder("llava-llama", here, language(Grid(4, 32)))
    tensors = load_file(here / "model.safetensors")

    def on_hub(name: str) -> str:
        return name.replace("vision_tower.", HUB["model.vision_tower."])

    save_file({on_hub(name): tensor for name, tensor in tensors.items()}, here / "model.safetensors")
    made = manifest.read(here)
    manifest.write(here, made.model_copy(update={"files": manifest.describe(here)}))
    convert(here, "awq", there)
    assert any(name.startswith("vision_tower.vision_model.") for name in load_file(there / "model.safetensors"))
    kept = json.loads((there / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {"model.vision_tower", "vision_tower", "lm_head"} <= set(kept)
    expected = logits(reference("llava-llama", weights), "llava-llama")
    assert torch.equal(logits(load(there), "llava-llama"), expected)


def test_shards_are_read_and_their_index_is_not_left_behind(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    weights = packed_folder("llava-llama", here, language(Grid(4, 32)), max_shard_bytes=50_000)
    assert len(list(here.glob("*.safetensors"))) > 2
    convert(here, "gptq", there)
    assert [path.name for path in sorted(there.glob("model*"))] == ["model.safetensors"]
    expected = logits(reference("llava-llama", weights), "llava-llama")
    assert torch.equal(logits(load(there), "llava-llama"), expected)


@pytest.mark.parametrize(
    ("to", "variant", "choose", "given", "message"),
    [
        ("awq", "llava-llama", language(Grid(3, 32)), {}, "3 bits, awq has 4; choose compressed-tensors"),
        ("gptq", "llava-llama", language(Grid(5, 32)), {}, "5 bits, gptq has 2, 3, 4, 8; choose"),
        ("awq", "llava-llama", language(Grid(4, 32)), {"inputs": Grid(8, ROW)}, "awq rounds no inputs; choose"),
        (
            "gptq",
            "llava-llama",
            language(Grid(8, ROW)),
            {"inputs": Grid(8, TENSOR), "limits": Limits(-1, 1)},
            "gptq rounds no inputs; choose",
        ),
        ("awq", "llava-llama", lambda name: Grid(4, 32, "mlp" in name), {}, "awq has one for the whole model; choose"),
        ("awq", "blip2-opt", lambda name: Grid(4, 32), {}, "readers of awq keep the qformer in full precision; export"),
        ("awq", "blip2-t5", language(Grid(4, 32)), {}, "no reader of awq takes a t5; keep it as it is"),
        ("gptq", "blip2-t5", but_qformer(Grid(4, 32)), {}, "no reader of gptq takes a t5; keep it as it is"),
        ("compressed-tensors", "llava-llama", language(Grid(4, 32)), {}, "in this layout already; choose another"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_written(
    to, variant, choose, given, message, tmp_path, monkeypatch
):
    packed_folder(variant, tmp_path / "here", choose, **given)
    monkeypatch.setattr("vlmq.exporter.convert.staged", lambda output: pytest.fail("something is written"))
    with pytest.raises((FormatError, VlmqError)) as refused:
        convert(tmp_path / "here", to, tmp_path / "there")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("variant", "choose", "to", "note"),
    [
        ("llava-llama", language(Grid(4, 32)), "gptq", None),
        ("llava-llama", lambda name: Grid(4, 32), "gptq", "loads anything else wrongly"),
        ("llava-llama", lambda name: Grid(4, 32), "awq", None),
        ("blip2-opt", language(Grid(4, 32)), "gptq-v2", "models whose first input is text, which this is not"),
    ],
)
def test_what_transformers_would_load_wrongly_is_said(variant, choose, to, note, tmp_path):
    packed_folder(variant, tmp_path / "here", choose)
    said = convert(tmp_path / "here", to, tmp_path / "there").note
    assert (note is None and said is None) or note in said


def test_a_kept_vision_tower_of_blip2_is_named_as_vllm_names_it_too(tmp_path):
    packed_folder("blip2-opt", tmp_path / "here", language(Grid(4, 32)))
    convert(tmp_path / "here", "awq", tmp_path / "there")
    kept = json.loads((tmp_path / "there" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert any(part in ".encoder.layers.0.self_attn.qkv" for part in kept)
    assert not any(part in "language_model.model.decoder.layers.0.self_attn.qkv_proj" for part in kept)


RTN = {"method": "rtn", "group_size": 32}


def exported(folder: Path, output: Path, recipe: dict) -> Path:
    export(Request(str(folder), output, make_recipe(RTN | recipe), formats="safetensors", verify=False))
    return output


def test_an_export_with_a_dense_weight_converts_and_its_dense_weight_stays(tiny_folders, tmp_path):
    recipe = {"components": {"connector": {"bits": 16}}, "qkv": "v-only"}
    here, there = exported(tiny_folders["blip2-opt"], tmp_path / "here", recipe), tmp_path / "there"
    convert(here, "awq", there)
    name = "vision_model.encoder.layers.0.self_attn.qkv"
    assert torch.equal(
        load_file(here / "model.safetensors")[f"{name}.weight"],
        load_file(there / "model.safetensors")[f"{name}.weight"],
    )
    assert manifest.coverage(there).tensors[name].stored == "dense"
    assert torch.equal(logits(load(here), "blip2-opt"), logits(load(there), "blip2-opt"))


@pytest.mark.parametrize(("end", "what"), [("head", "output head"), ("embedding", "token embedding")])
def test_the_ends_of_a_language_model_are_refused(end, what, tiny_folders, tmp_path):
    here = exported(tiny_folders["llava-llama"], tmp_path / "here", {end: {"bits": 4, "group_size": 32}})
    with pytest.raises(
        VlmqError, match=f"readers of gptq keep the {what} in full precision; export with it at 16 bits"
    ):
        convert(here, "gptq", tmp_path / "there")


def test_a_zero_that_version_1_cannot_store_stops_it_and_leaves_nothing(tmp_path):
    """Weights of one sign have their zero at 0."""
    here = tmp_path / "here"
    packed_folder("llava-llama", here, language(Grid(2, 16, symmetric=False)))
    with pytest.raises(FormatError, match=r"has a zero of 0, which gptq cannot store; choose gptq-v2"):
        convert(here, "gptq", tmp_path / "there")
    assert {path.name for path in tmp_path.iterdir()} == {"here", "here.source"}
    convert(here, "gptq-v2", tmp_path / "there")


def test_a_weight_that_is_not_what_the_manifest_says_is_refused(tmp_path):
    here = tmp_path / "here"
    packed_folder("llava-llama", here, language(Grid(4, 32)))
    tensors = load_file(here / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_packed"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, here / "model.safetensors", metadata={"format": "pt"})
    made = manifest.read(here)
    with pytest.raises(FormatError, match=r"model\.safetensors: .* vlmq\.json "):
        convert(here, "awq", tmp_path / "there")
    manifest.write(here, made.model_copy(update={"files": manifest.describe(here)}))
    with pytest.raises(VlmqError, match=rf"^{name.removesuffix('.weight_packed')}: not the weight whose sha256"):
        convert(here, "awq", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_the_command_names_its_output_says_what_it_did_and_ends_with_2_on_a_mistake(vlmq, tmp_path, monkeypatch):
    packed_folder("llava-llama", tmp_path / "here", language(Grid(4, 32)))
    monkeypatch.chdir(tmp_path)
    code, out, _ = vlmq("convert", "here", "--to", "awq")
    assert code == 0
    assert "here-awq: the same weights as awq, 3." in out
    code, _, err = vlmq("convert", "here", "--to", "awq")
    assert (code, "here-awq: exists already; choose another --output" in err) == (2, True)
    code, _, err = vlmq("convert", tmp_path / "here.source", "--to", "awq")
    assert (code, "name a folder that vlmq export wrote" in err) == (2, True)
    code, out, _ = vlmq("convert", "here", "--to", "gptq", "-o", "there", "--json")
    assert json.loads(out) == {"folder": "there", "note": None, "misses": []}
    assert vlmq("convert", "here", "--to", "gguf")[0] == 2
    assert vlmq("convert", "here")[0] == 2


@pytest.mark.parametrize(
    ("to", "variant", "choose"),
    [
        ("awq", "blip2-opt", but_qformer(Grid(4, 32, symmetric=False))),
        ("awq", "llava-llama", lambda name: Grid(4, 32)),
        ("awq", "llava-llama", lambda name: Grid(4, 64, symmetric=False) if "vision" in name else None),
        ("gptq", "llava-llama", language(Grid(4, 32))),
        ("gptq-v2", "llava-llama", language(Grid(4, 32, symmetric=False))),
        ("gptq", "llava-llama", language(Grid(8, 64))),
        ("gptq-v2", "llava-llama", language(Grid(3, ROW, symmetric=False))),
        ("gptq-v2", "llava-llama", language(Grid(2, 32))),
    ],
)
def test_transformers_answers_as_the_dequantized_reference(to, variant, choose, tmp_path):
    for package in ("gptqmodel", "optimum"):
        pytest.importorskip(package, reason=f"transformers reads awq and gptq with {package}, which is not installed")
    weights = packed_folder(variant, tmp_path / "here", choose)
    assert convert(tmp_path / "here", to, tmp_path / "there").note is None
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "there", dtype=torch.float32, output_loading_info=True
    )
    assert not {key: names for key, names in info.items() if names}
    assert {name for name, module in model.named_modules() if hasattr(module, "qweight")} == set(weights)
    expected = reference(variant, weights)
    asked = inputs(variant) | {"max_new_tokens": 8, "do_sample": False}
    assert model.generate(**asked).tolist() == expected.generate(**asked).tolist()
    # its kernels multiply in bfloat16; a zero that is off by one moves the logits by more than 1
    assert (logits(model, variant) - logits(expected, variant)).abs().max() < 0.02
