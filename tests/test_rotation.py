"""A rotated checkpoint is the same model, seen in other coordinates; transformers' own reader is the oracle."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from packed import inputs
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from vlmq.exporter.checkpoint import Checkpoint, open_checkpoint
from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.demo.models import DEMOS
from vlmq.exporter.demo.outliers import make_outliers
from vlmq.exporter.demo.packing import logits_of, pack
from vlmq.exporter.demo.splits import CALIBRATION
from vlmq.exporter.demo.world import scene_of
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.load import load
from vlmq.exporter.rotation import rotate, rotation
from vlmq.exporter.walk import walk
from vlmq.formats.folder import copy_companions
from vlmq.formats.shards import SafetensorsWriter

BOTH = ("vision", "language")


@pytest.fixture(params=tiny.DECODERS)
def variant(request):
    """A family with a stream that can be rotated."""
    return request.param


both = pytest.mark.parametrize("components", [("vision",), ("language",), BOTH])
demos = pytest.mark.parametrize("name", CHECKPOINTS)


def original(folder: Path) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@torch.no_grad()
def seen_and_said(model: nn.Module, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image features, as the language model reads them, and logits."""
    answer = model(**given, use_cache=False).logits
    image = model.get_image_features(pixel_values=given["pixel_values"], return_dict=True).pooler_output
    return torch.cat(list(image)), answer


def assert_same_model(rotated: nn.Module, reference: nn.Module, given: dict[str, torch.Tensor], turned: bool) -> None:
    """`turned`: the image features lie in the rotated stream of the language model, so their lengths alone are kept."""
    (seen, said), (image, logits) = seen_and_said(rotated, given), seen_and_said(reference, given)
    if turned:
        assert (seen - image).norm() > 0.1 * image.norm()
        seen, image = seen.norm(dim=-1), image.norm(dim=-1)
    for found, wanted in ((seen, image), (said, logits)):
        assert (found - wanted).norm() / wanted.norm() < 1e-4
        assert (found - wanted).abs().max() / wanted.abs().max() < 1e-4


def written(checkpoint: Checkpoint, folder: Path) -> Path:
    """The checkpoint's tensors as they are read, and its configuration."""
    folder.mkdir()
    writer = SafetensorsWriter(folder, 10**9)
    for name, place in checkpoint.places.items():
        writer.add({place.name: checkpoint.read(name)})
    writer.close()
    copy_companions(checkpoint.folder, folder, changes=checkpoint.changes)
    return folder


# The rotation


@pytest.mark.parametrize("width", [1, 3, 64, 80, 128, 768, 1408, 2560])
@pytest.mark.parametrize("keeps_mean", [True, False])
def test_a_rotation_is_orthogonal_and_keeps_the_mean_where_a_layer_norm_asks_for_it(width, keeps_mean):
    one = torch.eye(width, dtype=torch.float64)
    R = rotation(width, 0, keeps_mean)(one).T  # rows are rotated, so column i of R is row i of what comes out
    torch.testing.assert_close(R @ R.T, one, atol=1e-12, rtol=0)
    if keeps_mean:
        torch.testing.assert_close(R.sum(1), torch.ones(width, dtype=torch.float64), atol=1e-11, rtol=0)
    x = torch.randn(width, dtype=torch.float64)
    torch.testing.assert_close(rotation(width, 0, keeps_mean)(x), R @ x)


@pytest.mark.parametrize("width", [128, 768, 1408, 2560, 4096])
@pytest.mark.parametrize(("keeps_mean", "largest"), [(True, 6), (False, 1.5)])
def test_one_channel_is_spread_over_all(width, keeps_mean, largest):
    spikes = torch.eye(width, dtype=torch.float64)[:: width // 64]
    assert rotation(width, 0, keeps_mean)(spikes).abs().max() < largest / width**0.5


def test_a_seed_decides_the_rotation():
    x = torch.randn(4, 128, dtype=torch.float64)
    assert torch.equal(rotation(128, 1, True)(x), rotation(128, 1, True)(x))
    assert not torch.allclose(rotation(128, 1, True)(x), rotation(128, 2, True)(x))


def test_every_run_of_a_dimension_is_turned_by_itself():
    R = rotation(8, 0, keeps_mean=False)
    x = torch.randn(24, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(R.turn(x, 0)[8:16, 2, 1], R(x[8:16, 2, 1]))


# The rotated model


@both
def test_a_rotated_checkpoint_is_the_same_model(variant, components, tiny_folders):
    folder = tiny_folders[variant]
    rotated = rotate(open_checkpoint(str(folder)), components).model()
    assert_same_model(rotated, original(folder), inputs(variant), turned="language" in components)


@demos
def test_a_rotated_demo_is_the_same_model(name):
    rotated, reference = rotate(open_checkpoint(name), BOTH).model(), original(CHECKPOINTS[name])
    demo = DEMOS[name]
    batch = pack(demo, [scene_of(id) for id in CALIBRATION[:4]], questions=2)
    with torch.inference_mode():
        found, wanted = (
            logits_of(demo, model, batch, demo.look(model, batch.pixels)[-1]) for model in (rotated, reference)
        )
    assert (found - wanted).norm() / wanted.norm() < 1e-4


@pytest.mark.parametrize(
    ("variant", "block", "makers", "reader"),
    [
        ("blip2-opt", "language_model.model.decoder.layers.1", ("fc1",), "fc2"),
        ("llava-llama", "model.language_model.layers.1", ("mlp.up_proj", "mlp.gate_proj"), "mlp.down_proj"),
    ],
)
def test_channels_inside_a_feedforward_are_made_as_large_as_the_columns_that_read_them(
    variant, block, makers, reader, tmp_path
):
    folder = tiny.tiny_folder(variant, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    made, read = (
        next(name for name in tensors if name.endswith(f"layers.1.{end}.weight")) for end in (makers[0], reader)
    )
    tensors[made][5] *= 32
    tensors[read][:, 5] /= 32
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def sizes(model):
        values = torch.stack([model.get_parameter(f"{block}.{name}.weight").norm(dim=1) for name in makers]).prod(0)
        return values / model.get_parameter(f"{block}.{reader}.weight").norm(dim=0)

    checkpoint = open_checkpoint(str(folder))
    before, after = (sizes(made) for made in (checkpoint.model(), rotate(checkpoint, ("language",)).model()))
    assert before.max() > 100 * before.median()
    torch.testing.assert_close(after, after.median().expand_as(after), rtol=1e-4, atol=0)


def opt_with(entries: dict[str, object], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    made = tiny.config("blip2-opt")
    made.text_config.update(entries)
    monkeypatch.setattr(tiny, "config", lambda variant: made)
    return open_checkpoint(str(tiny.tiny_folder("blip2-opt", folder)))


def test_norms_keep_their_bias_where_the_linears_that_read_them_have_none(tmp_path, monkeypatch):
    checkpoint = opt_with({"enable_bias": False}, tmp_path / "model", monkeypatch)
    assert "language_model.model.decoder.layers.0.fc1.bias" not in checkpoint.places
    rotated = rotate(checkpoint, BOTH).model()
    assert_same_model(rotated, original(checkpoint.folder), inputs("blip2-opt"), turned=True)


@pytest.mark.parametrize(
    "entries",
    [
        {"word_embed_proj_dim": 32},
        {"do_layer_norm_before": False},
        {"layer_norm_elementwise_affine": False},
        {"_remove_final_layer_norm": True},
    ],
)
def test_an_opt_whose_stream_is_not_read_through_norms_alone_is_refused(entries, tmp_path, monkeypatch):
    checkpoint = opt_with(entries, tmp_path / "model", monkeypatch)
    with pytest.raises(VlmqError, match="the language of this blip-2 has no residual stream that can be rotated"):
        rotate(checkpoint, ["language"])


def test_a_norm_that_cannot_be_folded_is_refused(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["blip2-opt"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    norm = next(name for name in tensors if name.endswith("decoder.final_layer_norm.weight"))
    tensors[norm][3] = 0
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(VlmqError, match=r"final_layer_norm.weight: is 0 where .*bias is not"):
        rotate(open_checkpoint(str(folder)), ["language"]).model()


def test_the_language_of_an_encoder_decoder_is_refused_and_its_vision_is_not(tiny_folders):
    checkpoint = open_checkpoint(str(tiny_folders["blip2-t5"]))
    with pytest.raises(
        VlmqError, match="the language of this blip-2 has no residual stream that can be rotated; leave"
    ):
        rotate(checkpoint, ["language"])
    found, expected = rotate(checkpoint, ["vision"]).model(), checkpoint.model()
    asked = tiny.forward_inputs("blip2-t5", inputs("blip2-t5"))
    torch.testing.assert_close(found(**asked).logits, expected(**asked).logits, rtol=1e-3, atol=1e-3)


def test_the_connector_is_refused(variant, tiny_folders):
    with pytest.raises(VlmqError, match=r"the connector of this .* has no residual stream .*; leave connector out"):
        rotate(open_checkpoint(str(tiny_folders[variant])), ["connector"])


def test_no_components_leave_the_checkpoint_as_it_is(tiny_folders):
    checkpoint = open_checkpoint(str(tiny_folders["blip2-opt"]))
    assert rotate(checkpoint, []) == checkpoint


def test_norms_are_left_with_nothing_and_embeddings_and_values_are_rotated(variant, tiny_folders):
    checkpoint = open_checkpoint(str(tiny_folders[variant]))
    rotated = rotate(checkpoint, BOTH)
    for name in rotated.places:
        if name.endswith(("layer_norm1.weight", "layernorm.weight", "layer_norm.weight")) and "pre_" not in name:
            connector_or_dead = "qformer" in name or ("post_layernorm" in name and variant != "blip2-opt")
            assert bool((rotated.read(name) == 1).all()) != connector_or_dead, name
    changed = {name for name in checkpoint.places if not torch.equal(checkpoint.read(name), rotated.read(name))}
    values = {name for name in checkpoint.places if "v_proj" in name or "embed_tokens" in name}
    assert values <= changed


@torch.no_grad()
def test_values_of_grouped_queries_are_rotated_alike(tiny_folders):
    """Two key heads, four query heads: each head of the values is turned by one and the same R, kept in length."""
    checkpoint = open_checkpoint(str(tiny_folders["llava-mistral"]))
    value = "model.language_model.layers.1.self_attn.v_proj.weight"
    gamma = checkpoint.read("model.language_model.layers.1.input_layernorm.weight").double()
    before = checkpoint.read(value).double() * gamma
    after = rotate(checkpoint, ["language"]).model().get_parameter(value).double()
    assert len(before) == 32  # two heads of 16
    before, after = before.unflatten(0, (2, 16)), after.unflatten(0, (2, 16))
    torch.testing.assert_close(after.square().sum((1, 2)), before.square().sum((1, 2)), rtol=1e-5, atol=0)
    assert ((after - before).norm() / before.norm()) > 0.5


def test_a_table_that_matches_no_tensor_is_a_fault_of_the_table(tiny_folders):
    checkpoint = open_checkpoint(str(tiny_folders["blip2-opt"]))
    first = checkpoint.family.stages[0]
    wrong = replace(first, stream=replace(first.stream, sources=("vision_model.nothing",)))
    family = replace(checkpoint.family, stages=(wrong,))
    with pytest.raises(VlmqError, match=r"vision_model\.nothing\.weight matches no tensor; correct families.py"):
        rotate(replace(checkpoint, family=family), ["vision"])


# The view


def with_tied_head(variant: str, folder: Path) -> Path:
    """A copy whose head is the embedding's tensor."""
    tensors = load_file(folder / "model.safetensors")
    head = next((name for name in tensors if name.endswith("lm_head.weight")), None)
    if head is not None:
        del tensors[head]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("variant", ["blip2-opt", "llava-qwen2"])
def test_a_tied_head_becomes_a_tensor_of_its_own_and_every_reader_loads_it(variant, tiny_folders, tmp_path):
    folder = with_tied_head(variant, shutil.copytree(tiny_folders[variant], tmp_path / "model"))
    checkpoint = open_checkpoint(str(folder))
    head = "language_model.lm_head.weight" if variant == "blip2-opt" else "lm_head.weight"
    assert head not in checkpoint.places
    rotated = rotate(checkpoint, ["language"])
    assert rotated.dtype(head) == rotated.read(head).dtype == torch.float16
    reference = original(folder)
    assert_same_model(rotated.model(), reference, inputs(variant), turned=True)
    saved = written(rotated, tmp_path / "saved")
    for reader in (original, load):
        model = reader(saved)
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
        said, logits = seen_and_said(model, inputs(variant))[1], seen_and_said(reference, inputs(variant))[1]
        assert (said - logits).norm() / logits.norm() < 5e-3  # rotated weights are rounded to half precision anew
    assert open_checkpoint(str(saved)).family == rotated.family
    assert walk(rotated.skeleton(), rotated.family).kept[head.removesuffix(".weight")] == "output head"


def test_what_is_saved_is_what_was_there_but_for_the_tensors_of_the_stream(variant, tiny_folders, tmp_path):
    folder = tiny_folders[variant]
    saved = written(rotate(open_checkpoint(str(folder)), BOTH), tmp_path / "saved")
    before, after = load_file(folder / "model.safetensors"), load_file(saved / "model.safetensors")
    assert set(after) - set(before) == ({"language_model.lm_head.weight"} if variant == "blip2-opt" else set())
    for name, tensor in before.items():
        assert (after[name].shape, after[name].dtype) == (tensor.shape, tensor.dtype)
    config, kept = (json.loads((place / "config.json").read_text()) for place in (saved, folder))
    changes = {"tie_word_embeddings": False, "text_config": {**kept["text_config"], "tie_word_embeddings": False}}
    assert config == (kept | changes if variant == "blip2-opt" else kept)


def test_tensors_are_the_same_in_whatever_order_they_are_read(variant, tiny_folders):
    checkpoint = open_checkpoint(str(tiny_folders[variant]))
    one, same, other = (
        rotate(checkpoint, components, seed) for components, seed in ((BOTH, 3), (tuple(reversed(BOTH)), 3), (BOTH, 4))
    )
    first = {name: one.read(name) for name in one.places}
    again = {name: same.read(name) for name in sorted(same.places, reverse=True)}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other.read(name)) for name in first)


def test_a_filled_block_is_exact_and_a_read_tensor_is_what_a_file_of_its_dtype_holds(tiny_folders):
    rotated = rotate(open_checkpoint(str(tiny_folders["blip2-opt"])), BOTH)
    name = "language_model.model.decoder.layers.0"
    block = rotated.skeleton().get_submodule(name)
    rotated.fill(block, name)
    for inner, parameter in block.named_parameters(name):
        stored = rotated.read(inner)
        assert stored.dtype == rotated.dtype(inner) == torch.float16
        assert torch.equal(parameter.half(), stored)
    assert not torch.equal(block.fc1.weight, block.fc1.weight.half().float())


# What it is for


@torch.no_grad()
def peaks(name: str, model: nn.Module, sites: list[str]) -> dict[str, float]:
    """Of what each linear reads: its largest entry over its root mean square."""
    found: dict[str, float] = {}

    def keep(site: str):
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found[site] = (args[0].abs().max() / args[0].square().mean().sqrt()).item()

        return hook

    hooks = [model.get_submodule(site).register_forward_pre_hook(keep(site)) for site in sites]
    demo = DEMOS[name]
    batch = pack(demo, [scene_of(id) for id in CALIBRATION[:2]], questions=2)
    logits_of(demo, model, batch, demo.look(model, batch.pixels)[-1])
    for hook in hooks:
        hook.remove()
    return found


@demos
def test_outliers_of_the_stream_are_gone(name, tmp_path):
    checkpoint = open_checkpoint(str(make_outliers(CHECKPOINTS[name], tmp_path / "wild", finetune_steps=0)))
    plan = walk(checkpoint.skeleton(), checkpoint.family)
    readers = [
        entry.sites[0].name
        for block in plan.blocks
        for entry in block.inputs
        if block.component != "connector" and entry.source is not None and entry.source.rows is None
    ]
    before = peaks(name, original(checkpoint.folder), readers)
    after = peaks(name, rotate(checkpoint, BOTH).model(), readers)
    for site in readers:
        assert after[site] < 0.7 * before[site], site
        assert after[site] < 5.5 or "vision_tower" in site, site  # CLIP's stream stays as it is
