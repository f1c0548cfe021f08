"""Every export is loaded by transformers itself before it counts as made, and a difference fails it, in one line."""

import json
import shutil

import pytest
import torch
from packed import packed_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlmq.exporter import pipeline, release
from vlmq.exporter.evaluation.measure import Memory
from vlmq.exporter.evaluation.thresholds import limits
from vlmq.exporter.evaluation.verify import Side, Verdict
from vlmq.exporter.pipeline import Request
from vlmq.exporter.recipe import make_recipe
from vlmq.formats import card, compressed_tensors, manifest
from vlmq.formats.errors import FormatError
from vlmq.kernels.grid import ROW, Grid, Limits

pytestmark = pytest.mark.usefixtures("gated")


def mixed(name):
    return Grid(8, ROW) if "vision" in name else Grid(4, 32)


def relist(folder):
    """Bring the manifest up to date, as a fault of ours would."""
    made = manifest.read(folder)
    manifest.write(folder, made.model_copy(update={"files": manifest.describe(folder)}))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "out"
    packed_folder("blip2-opt", folder, mixed)
    return folder


def test_a_mixed_blip2_passes_unpacked_by_the_line_that_people_are_told(good):
    found = release.check(good)
    assert found.ok
    assert found.unpacked_by == compressed_tensors.UNPACK
    assert found.weights == len(load_file(good / "model.safetensors")) - 2 * len(manifest.read(good).tensors)
    assert found.same_tokens
    assert found.tokens > 0
    assert set(found.largest) == {"vision", "connector", "language"}
    assert max(found.largest.values()) <= release.LARGEST
    assert release.read(good) == found


def test_one_grid_passes_as_it_is_loaded_and_generating_first(tmp_path):
    for variant, symmetric in (("blip2-opt", False), ("blip2-t5", True), ("llava-qwen2", True)):
        packed_folder(variant, tmp_path / variant, lambda name, symmetric=symmetric: Grid(4, 32, symmetric))
        found = release.check(tmp_path / variant)
        assert found.ok, found.misses
        assert found.unpacked_by is None
        assert found.rounded  # float16 scales, and transformers multiplies in them
        assert found.same_tokens


def wrong_grid(folder):
    """Two grids under `dequantize`, which transformers silently reads as one."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dequantize"] = True
    (folder / "config.json").write_text(json.dumps(config))


def on_disk_names(folder):
    """Targets that match nothing in memory: the packed tensors are unexpected, and weights random."""
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = [target.replace("language_model", "lm") for target in group["targets"]]
    (folder / "config.json").write_text(json.dumps(config))


def lost(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("language_model.model.decoder.final_layer_norm.weight")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("fault", "messages"),
    [
        (on_disk_names, ["keys as unexpected", "are other weights", "vlmq's own reader refuses it"]),
        (
            lost,
            ["transformers reports language_model.model.decoder.final_layer_norm.weight and 0 more keys as miss"],
        ),
        (wrong_grid, ["are other weights"]),
    ],
)
def test_what_transformers_reads_otherwise_is_a_miss(good, tmp_path, fault, messages):
    folder = shutil.copytree(good, tmp_path / "out")
    fault(folder)
    relist(folder)
    found = release.check(folder)
    assert not found.ok
    for message in messages:
        assert any(message in miss for miss in found.misses), found.misses


def test_a_folder_that_transformers_cannot_load_at_all_is_a_miss(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "out")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-64])
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        release.check(folder)
    shutil.copy(good / "model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = "four"
    (folder / "config.json").write_text(json.dumps(config))
    found = release.check(folder)
    assert found.misses[0].startswith("transformers cannot load it: ")
    assert "\n" not in found.misses[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"same_tokens": False}, "generate() gives other greedy tokens than vlmq's reader"),
        ({"largest": {"vision": 0.01}}, "transformers' vision features differ by 1.0e-02 of their largest value"),
        ({"largest": {"vision": float("nan")}}, "vision features differ by nan"),
        ({"differing": ["a.weight", "b.weight"]}, "in transformers a.weight and 1 more are other weights"),
        ({"keys": {"unexpected": ["a"]}}, "transformers reports a and 0 more keys as unexpected"),
    ],
)
def test_every_kind_of_difference_is_a_line(changed, message):
    good = {"answers": True, "same_tokens": True}
    assert release.Release("", **good).ok
    found = release.Release("", **(good | changed))
    assert any(message in miss for miss in found.misses)


def test_where_inputs_are_rounded_weights_are_compared_and_answers_are_not(tmp_path):
    folder = tmp_path / "out"
    packed_folder("llava-llama", folder, lambda name: Grid(4, 32), inputs=Grid(8, ROW), limits=Limits(-1.0, 1.0))
    found = release.check(folder)
    assert found.ok, found.misses
    assert not found.answers
    assert found.weights > 0


def test_what_transformers_cannot_load_is_said(tmp_path):
    folder = tmp_path / "out"
    packed_folder("llava-llama", folder, lambda name: Grid(8 if "vision" in name else 4, 32, symmetric=False))
    found = release.check(folder)
    assert found.ok
    assert found.why_not.startswith("transformers cannot load several grids of which some are asymmetric")


@pytest.mark.parametrize(("choose", "inputs"), [(mixed, None), (lambda name: Grid(4, 32), Grid(8, ROW))])
def test_a_t5_of_several_grids_or_rounded_inputs_is_said_to_be_ours_alone_to_load(choose, inputs, tmp_path):
    folder = tmp_path / "out"
    packed_folder("blip2-t5", folder, choose, inputs=inputs)
    found = release.check(folder)
    assert found.ok
    assert found.why_not == "transformers cannot load a T5 with several grids or rounded inputs; vlmq's own load() does"
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'weight'"):  # and this is what it says
        AutoModelForImageTextToText.from_pretrained(folder)


def test_what_was_found_holds_for_the_files_it_was_found_for(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "out")
    release.check(folder)
    assert release.read(folder)
    relist(folder)
    made = manifest.read(folder)
    manifest.write(folder, made.model_copy(update={"vlmq": "another"}))
    assert release.read(folder) is None


def test_an_export_that_fails_the_gate_stays_and_the_command_exits_1_with_one_line(
    vlmq, tiny_folders, tmp_path, monkeypatch
):
    """Linears that config.json does not name, which one reader makes dense all the same and the other misses."""
    pack = compressed_tensors.quantization_config

    def forgetful(sites, kept, aliases=None):
        config = pack(sites, kept, aliases)
        for group in config["config_groups"].values():
            group["targets"] = [target for target in group["targets"] if "fc1" not in target]
        return config

    monkeypatch.setattr(compressed_tensors, "quantization_config", forgetful)
    flags = ("--method", "rtn", "--group-size", 32, "--format", "safetensors", "--no-verify")
    code, _, err = vlmq("export", tiny_folders["llava-llama"], *flags, "-o", tmp_path / "out")
    assert code == 1, err
    (line,) = err.splitlines()
    assert line.startswith(f"vlmq: {tmp_path / 'out'}: failed the release gate: vlmq's own reader refuses it: ")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / release.NAME).read_text())["ok"] is False


def test_an_export_is_gated_unless_it_is_asked_not_to_be(tiny_folders, tmp_path):
    recipe = make_recipe({"method": "rtn", "group_size": 32})
    request = Request(str(tiny_folders["blip2-opt"]), tmp_path / "a", recipe, formats="safetensors", verify=False)
    made = pipeline.export(request)
    assert made.release.ok
    assert made.release.keys == {"missing": [], "unexpected": [], "mismatched": []}
    assert torch.isfinite(torch.tensor(list(made.release.largest.values()))).all()


def test_after_a_verdict_and_the_gate_the_card_is_written_once_with_what_both_found(
    good, tiny_folders, pictures, tmp_path, monkeypatch
):
    folder = shutil.copytree(good, tmp_path / "out")
    side = Side(folder.name, "torch", 1, {"safetensors": 4, "onnx": 0}, Memory(1, 2, 3), 0.01)
    verdict = Verdict(12, 12, 4, {}, 0.9, side, side, thresholds=limits(4, {}))
    monkeypatch.setattr(pipeline, "verify", lambda *_, **__: verdict)
    written, write = [], card.write
    monkeypatch.setattr(card, "write", lambda *arguments: written.append(write(*arguments)))
    found, release_found = pipeline.verify_folder(folder, str(tiny_folders["blip2-opt"]), str(pictures))
    assert found.samples == 12
    assert release_found.ok
    assert len(written) == 1
    text = written[0].read_text()
    assert "90.0 %" in text
    assert "transformers has not been asked" not in text
    _, release_found = pipeline.verify_folder(folder, str(tiny_folders["blip2-opt"]), str(pictures), gate=False)
    assert release_found is None
    assert len(written) == 2
