"""Whole graphs of models that round inputs, or keep a weight in two containers, answer as the fake-quantized model."""

import json

import numpy as np
import onnx
import pytest
import torch
from graphs import half
from packed import textbook_input
from pictures import pictures, prompts
from tiny import tiny_folder
from torch import nn
from transformers import AutoProcessor

from vlmq.exporter.runtime import OnnxVlm, TorchVlm
from vlmq.formats.onnx_graphs import INPUTS, export
from vlmq.formats.onnx_weights import read_weights, summary
from vlmq.kernels.grid import ROW, TENSOR, Grid, Limits, to_grid
from vlmq.kernels.linear import QuantizedLinear

STEPS = 10
WIDE = Limits(-3.0, 4.0)
# by component: grid of the weights, grid and limits of the inputs
SCHEMES = {
    "blip2-opt": {
        "vision": (Grid(8, ROW), Grid(8, ROW), None),
        "connector": (Grid(8, ROW, symmetric=False), Grid(8, TENSOR, symmetric=False), WIDE),
        "language": (Grid(4, ROW), Grid(4, ROW), None),
    },
    "llava-llama": {
        "vision": (Grid(6, ROW), Grid(6, ROW, symmetric=False), None),
        "connector": (Grid(8, 32), None, None),
        "language": (Grid(4, 32), Grid(4, 32), None),
    },
}
PRODUCTS = {
    "blip2-opt": {("int8", False)},
    "llava-llama": {("int8", False), ("4+4", False), ("4", True)},
}


def component(name: str) -> str:
    if "vision" in name:
        return "vision"
    return "connector" if any(part in name for part in ("qformer", "projection", "projector")) else "language"


@pytest.fixture(scope="module", params=SCHEMES)
def made(request, tmp_path_factory):
    """(variant, folder, graphs, packed linears, dense linears that read what the textbook rounds, neither rounded)"""
    variant = request.param
    folder = tiny_folder(variant, tmp_path_factory.mktemp("rounded") / variant)
    packed, rounded, dense, weights = half(variant), half(variant), half(variant), {}
    for name, module in list(packed.named_modules()):
        if not isinstance(module, nn.Linear) or "lm_head" in name:
            continue
        grid, inputs, limits = SCHEMES[variant][component(name)]
        weights[name] = to_grid(module.weight.data, grid)
        packed.set_submodule(name, QuantizedLinear.from_weight(weights[name], module.bias, inputs, limits))
        rounded.get_submodule(name).weight.data = weights[name].dequantize()
        dense.get_submodule(name).weight.data = weights[name].dequantize()
        if inputs is not None:
            rounded.get_submodule(name).register_forward_pre_hook(
                lambda _, args, grid=inputs, limits=limits: textbook_input(args[0], grid, limits)
            )
    export(packed, folder)
    assistant = AutoProcessor.from_pretrained(folder)
    sides = (TorchVlm(model, assistant) for model in (packed, rounded, dense))
    return variant, folder, OnnxVlm(folder, threads=1), *sides, weights


def test_the_tokens_are_those_of_the_fake_quantized_model(made):
    variant, _, graphs, packed, rounded, _, _ = made
    asked = pictures(), prompts(variant), STEPS
    assert graphs.generate(*asked) == packed.generate(*asked) == rounded.generate(*asked)


def test_the_logits_are_those_of_the_fake_quantized_model(made):
    """A value that lies between two levels may be rounded to either: that is far less than what rounding changes."""
    variant, _, graphs, _, rounded, dense, _ = made
    expected = rounded.next_logits(pictures(), prompts(variant))
    changed = np.linalg.norm(dense.next_logits(pictures(), prompts(variant)) - expected)
    assert changed > 0.05 * np.linalg.norm(expected)
    assert np.linalg.norm(graphs.next_logits(pictures(), prompts(variant)) - expected) < 0.02 * changed


def test_the_graphs_hold_the_weights_that_were_solved_bit_for_bit(made):
    _, folder, _, _, _, _, weights = made
    read = {name: weight for path in (folder / "onnx").glob("*.onnx") for name, weight in read_weights(path).items()}
    assert len(read) > 20
    for name, weight in read.items():
        assert torch.equal(weight.dequantize(), weights[name].dequantize()), name


def test_the_manifest_can_say_what_each_linear_became(made):
    variant, folder, _, _, _, _, _ = made
    told = summary(folder)
    assert {(entry["product"], entry["simulated"]) for entry in told} == PRODUCTS[variant]
    stored = 0
    for path in (folder / "onnx").glob("*.onnx"):
        values = onnx.load(path).graph.initializer
        parts = ("qweight", "scales", "qzeros", "qweight_high", "qzeros_high")
        stored += sum(len(value.raw_data) for value in values if value.name.rpartition(".")[2] in parts)
    assert sum(entry["bytes"] for entry in told) == stored
    assert sum(entry["linears"] for entry in told) == sum(
        len(read_weights(path)) for path in (folder / "onnx").glob("*.onnx")
    )


def test_a_graph_says_what_its_inputs_are_rounded_to(made):
    variant, folder, _, _, _, _, _ = made
    (path,) = (folder / "onnx").glob("vision_encoder*.onnx")
    properties = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    said = json.loads(properties[INPUTS])
    name = next(name for name in said if component(name) == "vision")
    inputs = SCHEMES[variant]["vision"][1]
    assert said[name] == [inputs.bits, inputs.group, inputs.symmetric, None, None]
