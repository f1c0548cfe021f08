"""Modality weights against gradients got in other ways: plain autograd, and finite differences in float64."""

import pytest
import torch
from tiny import DECODERS, processor, tiny

from vlmq.exporter import modality
from vlmq.exporter.calibration import prepare, vision_tokens
from vlmq.exporter.checkpoint import Checkpoint, open_checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.samples import Sample

IMAGE_TOKEN = 4  # of every tiny model
BLOCKS = {"blip2-opt": "language_model.model.decoder.layers", "llava-llama": "model.language_model.layers"}


@pytest.fixture(params=DECODERS)
def variant(request):
    """Those whose prompt and answer are one sequence; test_encoder_decoder.py has the other."""
    return request.param


@pytest.fixture
def batches(variant, tiny_folders, random_samples):
    """Six questions of two lengths about pictures, with answers; batches of three."""
    checkpoint = open_checkpoint(str(tiny_folders[variant]))
    return checkpoint, prepare(random_samples[:6], processor(variant), checkpoint.family)


def _loss(logits, tokens):
    """Mean cross-entropy of the tokens from the second after the image on; one sample."""
    first = max(place for place, token in enumerate(tokens.tolist()) if token == IMAGE_TOKEN) + 2
    chances = logits.log_softmax(-1)
    return -sum(chances[place - 1, tokens[place]] for place in range(first, len(tokens))) / (len(tokens) - first)


def _stored(variant):
    """The tiny model with the values its half-precision folder holds."""
    model = tiny(variant)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model


def _in_float64(model):
    """Also where transformers computes in float32 whatever comes in."""
    for module in model.double().modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, norm=module: norm.weight * x / (x.pow(2).mean(-1, True) + 1e-6).sqrt()
    return model


def _path(variant):
    return BLOCKS["blip2-opt" if variant == "blip2-opt" else "llava-llama"]


def _ratio(sizes, tokens):
    """sizes: |dL/dy| of every token of every sample; tokens beside them."""
    vision = tokens == IMAGE_TOKEN
    return (sizes[vision].mean() / sizes[~vision].mean()).item()


def test_weights_are_the_ratios_of_plain_autograds_gradients(variant, batches):
    checkpoint, prepared = batches
    model = _stored(variant)  # every parameter has its gradient here
    blocks = list(model.get_submodule(_path(variant)))
    sizes, tokens = [[] for _ in blocks], []
    for batch in prepared:
        outputs = []
        hooks = [block.register_forward_hook(lambda m, a, y, kept=outputs: kept.append(y)) for block in blocks]
        logits = model(**batch, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        for output in outputs:
            output.retain_grad()
        sum(_loss(*pair) for pair in zip(logits, batch["input_ids"], strict=True)).backward()
        for kept, output in zip(sizes, outputs, strict=True):
            kept.append(output.grad.abs().mean(-1).flatten())
        tokens.append(batch["input_ids"].flatten())
    expected = {
        f"{_path(variant)}.{index}": _ratio(torch.cat(kept), torch.cat(tokens)) for index, kept in enumerate(sizes)
    }
    found = modality.weights(checkpoint, prepared)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert found[f"{_path(variant)}.0"] > 0.01


@pytest.mark.parametrize("variant", BLOCKS)
def test_weights_are_the_ratios_of_finite_differences(variant, batches):
    checkpoint, prepared = batches
    sample = {key: value[:1] for key, value in prepared[0].items()}
    tokens, width, step = sample["input_ids"][0], 64, 1e-5
    model = _in_float64(_stored(variant))
    sample["pixel_values"] = sample["pixel_values"].double()
    nudges = step * torch.eye(len(tokens) * width, dtype=torch.float64).view(-1, len(tokens), width)
    losses = []
    with torch.no_grad():
        clean = {}
        second = model.get_submodule(_path(variant))[1]
        hook = second.register_forward_pre_hook(lambda m, a, k: clean.update(args=a, kwargs=k), with_kwargs=True)
        model(**sample, use_cache=False)
        hook.remove()
        head = model.get_submodule("language_model.lm_head" if variant == "blip2-opt" else "lm_head")
        language = model.get_submodule(_path(variant).rpartition(".")[0])
        norm = language.final_layer_norm if variant == "blip2-opt" else language.norm
        for sign in (1, -1):
            hidden = second(clean["args"][0] + sign * nudges, *clean["args"][1:], **clean["kwargs"])
            losses.append(torch.stack([_loss(logits, tokens) for logits in head(norm(hidden))]))
    sizes = ((losses[0] - losses[1]) / (2 * step)).abs().view(len(tokens), width).mean(1)
    sample["pixel_values"] = sample["pixel_values"].float()
    found = modality.weights(checkpoint, [sample])
    assert found[f"{_path(variant)}.0"] == pytest.approx(_ratio(sizes, tokens), rel=1e-4)


def test_an_image_that_no_text_attends_to_weighs_nothing(variant, batches, monkeypatch):
    def deaf(checkpoint):
        model = tiny(variant)
        for name, parameter in model.named_parameters():
            if name.startswith(_path(variant)) and ".self_attn.o" in name:  # o_proj, out_proj
                parameter.data.zero_()
        return model

    checkpoint, prepared = batches
    monkeypatch.setattr(Checkpoint, "model", deaf)
    assert set(modality.weights(checkpoint, prepared).values()) == {0.0}


def test_the_same_samples_in_other_batches_weigh_the_same(variant, batches, random_samples):
    checkpoint, prepared = batches
    singly = [
        batch for sample in random_samples[:6] for batch in prepare([sample], processor(variant), checkpoint.family)
    ]
    assert modality.weights(checkpoint, singly) == pytest.approx(modality.weights(checkpoint, prepared), rel=1e-5)


def test_weights_work_where_gradients_are_off_and_leave_them_off(variant, batches):
    checkpoint, prepared = batches
    with torch.no_grad():
        found = modality.weights(checkpoint, prepared[:1])
        assert not torch.is_grad_enabled()
    assert len(found) == 2


def test_samples_without_an_image_change_nothing_and_alone_are_refused(tiny_folders, random_samples):
    checkpoint = open_checkpoint(str(tiny_folders["llava-llama"]))
    text = Sample("text", None, "question", "how many ?", ("red",))
    both = prepare([*random_samples[:2], text], processor("llava-llama"), checkpoint.family)
    assert modality.weights(checkpoint, both) == modality.weights(checkpoint, both[1:])
    assert "pixel_values" not in both[0]
    with pytest.raises(VlmqError, match=r"^token_weights: .*no sample has an image; add some, or choose none$"):
        modality.weights(checkpoint, both[:1])


def test_image_positions_are_those_of_the_placeholder(variant, batches):
    checkpoint, prepared = batches
    found = vision_tokens(prepared[0], checkpoint.config)
    assert found.dtype == torch.bool
    assert found.sum(1).tolist() == [4 if variant == "blip2-opt" else 16] * 3


def test_no_weight_is_below_the_median_once_floored():
    assert modality.floored({"a": 0.9, "b": 0.5, "c": 0.0}) == {"a": 0.9, "b": 0.5, "c": 0.5}
