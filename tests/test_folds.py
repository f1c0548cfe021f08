import pytest
import tiny
import torch

from vlmq.exporter import folds
from vlmq.exporter.calibration import Calibration, gather, prepare
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import family_of
from vlmq.exporter.walk import walk


def inputs(model, variant, samples):
    return prepare(samples, tiny.processor(variant), family_of(model.config))


def scales(columns, seed=0):
    return torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(seed)))


@torch.no_grad()
def test_folding_any_scale_everywhere_leaves_the_logits_unchanged(variant, random_samples):
    """All folds of a model at once, norms and their biases, v before o, fused v, ReLU and gated products."""
    model = tiny.tiny(variant)
    batch = inputs(model, variant, random_samples)[0]
    before = model(**batch).logits
    folded = 0
    for block in walk(model, family_of(model.config)).blocks:
        for entry in block.inputs:
            if entry.source is not None:
                folds.fold(entry, scales(entry.sites[0].columns, folded), model)
                folded += 1
    after = model(**batch).logits
    assert folded >= 10
    assert (after - before).norm() / before.norm() < 1e-5


@pytest.mark.parametrize("part", ["q", "k"])
@torch.no_grad()
def test_a_fold_into_the_wrong_rows_of_a_fused_projection_is_caught(part, random_samples):
    """Fault 5 of the released code: the scale of the output projection belongs to v's rows, 2C:3C, and no others."""
    model = tiny.tiny("blip2-opt")
    found = walk(model, family_of(model.config))
    block = found.blocks[0]
    entry = next(entry for entry in block.inputs if entry.source and entry.source.rows)
    calls = [*Calibration(model, inputs(model, "blip2-opt", random_samples)).calls(found.stages[0]).values()]
    _, (before, *_) = gather(block, model, calls)
    right = entry.source.rows
    fused = block.sites[0]
    object.__setattr__(entry.source, "rows", fused.part_rows(part))
    folds.fold(entry, scales(entry.sites[0].columns), model)
    with pytest.raises(VlmqError, match="folding changed its output"):
        folds.check(block.name, before, calls[0].run(model.get_submodule(block.name)))
    assert right == slice(128, 192)


@torch.no_grad()
def test_a_fold_that_forgets_the_bias_is_caught(random_samples):
    """Fault 2 of the released code."""
    model = tiny.tiny("blip2-opt")
    found = walk(model, family_of(model.config))
    block = found.blocks[0]
    calls = [*Calibration(model, inputs(model, "blip2-opt", random_samples)).calls(found.stages[0]).values()]
    _, (before, *_) = gather(block, model, calls)
    entry = block.inputs[0]
    norm = model.get_submodule(entry.source.name)
    bias = norm.bias.clone()
    folds.fold(entry, scales(entry.sites[0].columns), model)
    norm.bias.copy_(bias)
    with pytest.raises(VlmqError, match="folding changed its output"):
        folds.check(block.name, before, calls[0].run(model.get_submodule(block.name)))


def test_nothing_is_folded_across_gelu(variant):
    """Fault 3: fc1 -> fc2 of a vision tower does not commute with a scale."""
    model = tiny.tiny(variant)
    for block in walk(model, family_of(model.config)).blocks:
        for entry in block.inputs:
            if entry.sites[0].name.endswith("mlp.fc2"):
                assert entry.source is None
