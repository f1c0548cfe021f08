"""The ONNX folder: three graphs, their weights beside them, as onnxruntime and transformers.js read it.

    onnx/{vision_encoder,embed_tokens,decoder_model_merged}<suffix>.onnx         the graph, tensors below 1 KiB inside
    onnx/{vision_encoder,embed_tokens,decoder_model_merged}<suffix>.onnx_data    the other tensors

A language model with an encoder has a fourth, `encoder_model`, and another decoder (onnx_encoder_decoder.py).

`<suffix>` is transformers.js' name of a precision, here of the container that holds most of the quantized weights:
`_q4`, `_q2`, `_quantized` (8 bits), or nothing. Activations are float32. A quantized linear is a
`com.microsoft::MatMulNBits` whose initializers are called `<module>.qweight`, `.scales` and `.qzeros`; which grid its
codes are on is in the model's metadata under `vlmq.grids`, because a container may have more bits than the grid.
"""

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from vlmq.formats import onnx_encoder_decoder
from vlmq.formats.errors import FormatError
from vlmq.formats.onnx_finish import INLINE_BYTES, finish
from vlmq.formats.onnx_modules import DECODER, LOOKING, Decoder, Part, parts_of
from vlmq.kernels.embedding import QuantizedEmbedding
from vlmq.kernels.linear import QuantizedLinear
from vlmq.kernels.nbits import CONTAINERS

OPSET = 20
GRIDS = "vlmq.grids"
SUFFIX = {2: "_q2", 4: "_q4", 8: "_quantized"}
CHATTY = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")


def export(model: PreTrainedModel, folder: Path, accuracy_level: int = 0) -> list[Path]:
    """Write the graphs of a float32 model on the CPU into folder/onnx; returns the files, graphs first.

    Linears may be QuantizedLinear or plain. accuracy_level is MatMulNBits': 0 computes in float32, 4 in int8 (faster,
    a few per cent of error a layer); 8-bit weights always get 4. FormatError for a model no graph can be made of, one
    whose linears round their inputs included.
    """
    graphs = graphs_of(model)
    if model.dtype != torch.float32:
        kind = model.config.model_type
        raise FormatError(f"{kind}: graphs are made from float32, not {model.dtype}; load it in float32")
    for name, linear in quantized_linears(model).items():
        if linear.inputs is not None:
            raise FormatError(f"{name}: ONNX graphs hold no activation grid; choose --format safetensors")
    target = folder / "onnx"
    target.mkdir(parents=True, exist_ok=True)
    suffix = suffix_of(model)
    return [
        path for name in graphs for path in _write(trace(model, name, accuracy_level), target / f"{name}{suffix}.onnx")
    ]


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


def suffix_of(model: nn.Module) -> str:
    """What the file names of the model's graphs end in, before .onnx."""
    weights: Counter[int] = Counter()
    for module in quantized_linears(model).values():
        weights[CONTAINERS[module.grid.bits]] += module.in_features * module.out_features
    return SUFFIX[weights.most_common(1)[0][0]] if weights else ""


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """{name in the model: layer}"""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def trace(model: PreTrainedModel, name: str, accuracy_level: int = 0) -> ir.Model:
    """One of `graphs_of`, cleaned and with its weights in memory; the model is as before."""
    with _dense_embedding(model), _ready(model, accuracy_level), _quiet(), torch.no_grad():
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
    finish(program.model)
    program.model.metadata_props[GRIDS] = json.dumps(
        {
            name: [
                linear.grid.bits,
                linear.grid.group,
                linear.grid.symmetric,
                linear.in_features,
                str(linear.scales.dtype),
            ]
            for name, linear in sorted(quantized_linears(model).items())
            if f"{name}.qweight" in program.model.graph.initializers
        }
    )
    return program.model


def _write(graph: ir.Model, path: Path) -> list[Path]:
    data = path.with_name(f"{path.name}_data")
    ir.save(graph, path, external_data=data.name, size_threshold_bytes=INLINE_BYTES)
    return [path, data] if data.exists() else [path]


@contextmanager
def _dense_embedding(model: PreTrainedModel) -> Iterator[None]:
    """A packed token embedding dequantized: the graph that looks tokens up has a table of floats."""
    packed = model.get_input_embeddings()
    if not isinstance(packed, QuantizedEmbedding):
        yield
        return
    model.set_input_embeddings(packed.dense())
    try:
        yield
    finally:
        model.set_input_embeddings(packed)


@contextmanager
def _ready(model: nn.Module, accuracy_level: int) -> Iterator[None]:
    """Quantized linears in MatMulNBits' layout and with the accuracy level; attention as plain products.

    The graph of torch's fused attention guards against NaN in rows that see nothing, which costs a tenth of the time
    of a step and protects only padding.
    """
    changes: list[tuple[object, str, object]] = []
    for linear in quantized_linears(model).values():
        linear.to_portable()
        changes.append((linear, "accuracy_level", accuracy_level))
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    changes.extend((config, "_attn_implementation", "eager") for config in configs.values())

    before = [getattr(owner, name) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)


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
