"""The checkpoints that benchmarks/scale.py exports: of a true shape, drawn, and fit for everything that is done."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from random_checkpoint import SHAPES, Size, make

from vlmq.exporter.calibration import prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.ends import plan
from vlmq.exporter.recipe import Recipe
from vlmq.exporter.runtime import open_processor
from vlmq.exporter.skeleton import skeleton
from vlmq.formats.shards import headers

BILLIONS = {"blip2-opt-2.7b": 3.745, "llava-1.5-7b": 7.063}  # of parameters, as the Hub says of both
HUB = {  # names that both checkpoints have on the Hub
    "blip2-opt-2.7b": (
        "language_model.model.decoder.layers.1.fc1.weight",
        "qformer.encoder.layer.0.crossattention.attention.key.weight",
        "vision_model.encoder.layers.1.self_attn.qkv.weight",
    ),
    "llava-1.5-7b": (
        "language_model.lm_head.weight",
        "language_model.model.layers.1.mlp.down_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
    ),
}


@pytest.fixture(scope="module", params=SHAPES)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / request.param
    make(request.param, folder, Size(scale=1 / 16), shard_bytes=5 * 10**6)
    return request.param, folder


@pytest.mark.parametrize("shape", SHAPES)
def test_a_whole_shape_has_as_many_parameters_as_the_hub_says(shape):
    count = sum(parameter.numel() for parameter in skeleton(SHAPES[shape][0](Size())).parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[shape], rel=1e-3)


def test_it_is_sharded_half_precision_under_the_hub_s_names(made):
    shape, folder = made
    found = headers(folder)
    assert set(HUB[shape]) <= set(found)
    assert {header.dtype for header in found.values()} == {torch.float16}
    assert len({header.file for header in found.values()}) > 1


def test_every_linear_of_it_can_be_quantized_in_groups_of_128(made):
    checkpoint = open_checkpoint(str(made[1]))
    model = checkpoint.skeleton()
    recipe = Recipe()
    schemes = recipe.assign(plan(checkpoint, model, recipe)).schemes
    assert all(model.get_submodule(name).in_features % 128 == 0 for name in schemes)


def test_it_looks_at_a_picture_and_answers_with_finite_logits_of_one_size(made, random_samples):
    checkpoint = open_checkpoint(str(made[1]))
    batch = prepare(random_samples[:1], open_processor(checkpoint.folder), checkpoint.family)[0]
    with torch.no_grad():
        logits = checkpoint.model()(**batch).logits
    assert torch.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
