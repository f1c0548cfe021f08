"""The ONNX folder: three graphs, their weights beside them, as onnxruntime and transformers.js read it.

    onnx/{vision_encoder,embed_tokens,decoder_model_merged}<suffix>.onnx         the graph, tensors below 1 KiB inside
    onnx/{vision_encoder,embed_tokens,decoder_model_merged}<suffix>.onnx_data    the other tensors

A language model with an encoder has a fourth, `encoder_model`, and another decoder (onnx_encoder_decoder.py).

`<suffix>` is transformers.js' name of a precision, here of the container that holds most of the quantized weights:
`_q4`, `_q2`, `_quantized` (8 bits, and two containers that make up 6 or 8), or nothing; in float16 `_q4f16`, `_fp16`.

A quantized linear is one node, on initializers that are called `<module>.qweight`, `.scales` and so on: MatMulNBits of
onnxruntime, or a function of domain `vlmq` that the graph brings along (kernels/products.py, kernels/functions.py). A
packed token embedding is one, too: GatherBlockQuantized. Which grid the codes are on, and which product it is, is in
the graph's metadata under `vlmq.grids`; what grid its input is rounded to under `vlmq.inputs`.
"""

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from vlmq.formats import onnx_encoder_decoder
from vlmq.formats.errors import FormatError
from vlmq.formats.onnx_finish import INLINE_BYTES, finish, rename
from vlmq.formats.onnx_modules import DECODER, LOOKING, Decoder, Part, parts_of
from vlmq.kernels.embedding import QuantizedEmbedding
from vlmq.kernels.graph_embedding import GraphEmbedding, has_operator
from vlmq.kernels.graph_linear import GraphLinear
from vlmq.kernels.linear import QuantizedLinear
from vlmq.kernels.products import LOOKUP, PARTS, Product, product

OPSET = 20
GRIDS = "vlmq.grids"
INPUTS = "vlmq.inputs"
SUFFIX = {2: "_q2", 4: "_q4", 6: "_quantized", 8: "_quantized"}
CHATTY = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")


def export(model: PreTrainedModel, folder: Path, accuracy_level: int = 0) -> list[Path]:
    """Write the graphs of a model on the CPU into folder/onnx; returns the files, graphs first.

    Linears may be QuantizedLinear or plain. accuracy_level: 0 gives the products of the fake-quantized model; 4
    multiplies in int8, faster and with a few per cent of error a layer, where inputs are not rounded to a grid anyway.
    A graph computes in the model's dtype: float32, or float16 for providers that have it.
    FormatError for a model no graph can be made of.
    """
    graphs = graphs_of(model)
    _refuse_dtype(model, accuracy_level)
    target = folder / "onnx"
    target.mkdir(parents=True, exist_ok=True)
    suffix = suffix_of(model, accuracy_level)
    with _ready(model, accuracy_level):
        return [path for name in graphs for path in _write(_traced(model, name), target / f"{name}{suffix}.onnx")]


def _refuse_dtype(model: PreTrainedModel, accuracy_level: int) -> None:
    """FormatError where no graph computes in the model's dtype."""
    if model.dtype == torch.float32:
        return
    if model.dtype != torch.float16:
        kind = model.config.model_type
        raise FormatError(f"{kind}: graphs compute in float32 or float16, not {model.dtype}; load it in float32")
    for name, linear in quantized_linears(model).items():
        if linear.inputs is not None or len(_product(linear, accuracy_level).containers) > 1:
            raise FormatError(f"{name}: a float16 graph has no product of {linear.grid}; load the model in float32")
        if not torch.equal(linear.scales.half().double(), linear.scales.double()):
            raise FormatError(f"{name}: float16 does not hold its scales exactly; load the model in float32")


def graphs_of(model: PreTrainedModel) -> dict[str, type[Part]]:
    """The graphs of a model by name, in the order in which they run; FormatError where it has none."""
    parts_of(model)
    if not model.config.text_config.is_encoder_decoder:
        return {**LOOKING, DECODER: Decoder}
    onnx_encoder_decoder.refuse(model)
    return {
        **LOOKING,
        onnx_encoder_decoder.ENCODER: onnx_encoder_decoder.Encoder,
        DECODER: onnx_encoder_decoder.Decoder,
    }


def suffix_of(model: PreTrainedModel, accuracy_level: int = 0) -> str:
    """What the file names of the model's graphs end in, before .onnx."""
    weights: Counter[int] = Counter()
    for linear in quantized_linears(model).values():
        bits = sum(_product(linear, accuracy_level).containers)
        weights[bits] += linear.in_features * linear.out_features
    suffix = SUFFIX[weights.most_common(1)[0][0]] if weights else ""
    return suffix if model.dtype == torch.float32 else f"{suffix}f16" if suffix else "_fp16"


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """{name in the model: layer}"""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def trace(model: PreTrainedModel, name: str, accuracy_level: int = 0) -> ir.Model:
    """One of `graphs_of`, cleaned and with its weights in memory; the model is as before."""
    with _ready(model, accuracy_level):
        return _traced(model, name)


def _product(linear: QuantizedLinear, accuracy_level: int) -> Product:
    return product(linear.grid, linear.inputs, accuracy_level)


def _traced(model: PreTrainedModel, name: str) -> ir.Model:
    """One of `graphs_of`, of a model that is `_ready`."""
    with _quiet(), torch.no_grad():
        part = graphs_of(model)[name](model).eval()
        program = torch.onnx.export(
            part,
            part.example(),
            input_names=part.inputs,
            output_names=part.outputs,
            dynamic_shapes=part.dynamic(),
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None  # only with a file name is there none
    finish(program.model, shrink=model.dtype == torch.float32)
    _name_once(program.model.graph, model)
    _describe(program.model, model)
    return program.model


def _name_once(graph: ir.Graph, model: nn.Module) -> None:
    """Call the tensors of a packed embedding that has several names, as T5's, by its first."""
    first = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        for part in PARTS if isinstance(module, GraphEmbedding) and name != first[id(module)] else ():
            if f"{name}.{part}" in graph.initializers:
                rename(graph, f"{name}.{part}", f"{first[id(module)]}.{part}")


def _describe(graph: ir.Model, model: nn.Module) -> None:
    """Say in the metadata of a graph what each of its quantized linears is."""
    made = {
        name: module
        for name, module in sorted(model.named_modules())
        if isinstance(module, GraphLinear | GraphEmbedding) and f"{name}.qweight" in graph.graph.initializers
    }
    linears = {name: module for name, module in made.items() if isinstance(module, GraphLinear)}
    grids = {
        name: [
            module.grid.bits,
            module.grid.group,
            module.grid.symmetric,
            module.in_features if isinstance(module, GraphLinear) else module.embedding_dim,
            str(module.solved),
            module.product.kind if isinstance(module, GraphLinear) else LOOKUP,
        ]
        for name, module in made.items()
    }
    inputs = {
        name: [*astuple(linear.inputs), *(astuple(linear.limits) if linear.limits else (None, None))]
        for name, linear in linears.items()
        if linear.inputs is not None
    }
    graph.metadata_props[GRIDS] = json.dumps(grids)
    if inputs:
        graph.metadata_props[INPUTS] = json.dumps(inputs)


def _write(graph: ir.Model, path: Path) -> list[Path]:
    data = path.with_name(f"{path.name}_data")
    ir.save(graph, path, external_data=data.name, size_threshold_bytes=INLINE_BYTES)
    return [path, data] if data.exists() else [path]


@contextmanager
def _looked_up(model: PreTrainedModel) -> Iterator[None]:
    """A packed token embedding as onnxruntime has it, or where it has none, dequantized."""
    packed = model.get_input_embeddings()
    if not isinstance(packed, QuantizedEmbedding):
        yield
        return
    readable = has_operator(packed.grid, packed.embedding_dim)
    made = GraphEmbedding(packed, model.dtype) if readable else packed.dense()
    model.set_input_embeddings(made)
    try:
        yield
    finally:
        model.set_input_embeddings(packed)


@contextmanager
def _ready(model: PreTrainedModel, accuracy_level: int) -> Iterator[None]:
    """Quantized linears and a packed embedding as onnxruntime has them; attention as plain products.

    The graph of torch's fused attention guards against NaN in rows that see nothing, which costs a tenth of the time
    of a step and protects only padding.
    """
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    linears = quantized_linears(model)
    with _looked_up(model):
        try:
            for config, _ in before:
                config._attn_implementation = "eager"
            for name, linear in linears.items():
                made = GraphLinear(linear, _product(linear, accuracy_level), model.dtype)
                model.set_submodule(name, made)
            yield
        finally:
            for name, linear in linears.items():
                model.set_submodule(name, linear)
            for config, implementation in before:
                config._attn_implementation = implementation


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and advice; errors still raise."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
