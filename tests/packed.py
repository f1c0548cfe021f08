"""Exported folders made by hand from tiny models, without the pipeline: what the tests of readers read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import IMAGE, processor, tiny, tiny_folder
from torch import nn

from vlmq.exporter.names import memory_names
from vlmq.formats import compressed_tensors, manifest
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.folder import copy_companions
from vlmq.formats.shards import SafetensorsWriter
from vlmq.kernels.grid import ROW, TENSOR, Grid, Limits, QuantizedWeight, to_grid

Choose = Callable[[str], Grid | None]  # in-memory name of a linear to its grid; None keeps it


def packed_folder(
    variant: str,
    folder: Path,
    choose: Choose,
    dtype: torch.dtype = torch.float16,
    max_shard_bytes: int = 10**9,
    inputs: Grid | None = None,
    limits: Limits | None = None,
) -> dict[str, QuantizedWeight]:
    """Write `folder` beside `<folder>.source`; the quantized weights by in-memory name. lm_head is always kept.

    inputs, limits: of every quantized linear.
    """
    source = tiny_folder(variant, folder.with_suffix(".source"), dtype=dtype)
    model = tiny(variant)
    tensors = load_file(source / "model.safetensors")
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    folder.mkdir()
    writer = SafetensorsWriter(folder, max_shard_bytes)
    weights, records, kept = {}, {}, {}
    for disk, memory in memory_names(tensors, model).items():
        name, module = memory.removesuffix(".weight"), disk.removesuffix(".weight")
        grid = choose(name) if name in linears and not name.endswith("lm_head") else None
        if grid is None:
            writer.add({disk: tensors[disk]})
            if name in linears:
                kept[module] = "asked for"
            continue
        weights[name] = to_grid(tensors[disk], grid, dtype)
        records[module] = manifest.record(weights[name], "rtn", None, inputs, limits)
        writer.add(compressed_tensors.pack(module, weights[name], inputs, limits))
    writer.close()
    sites = {name: Grids(weight.grid, inputs, limits) for name, weight in weights.items()}
    copy_companions(source, folder, compressed_tensors.quantization_config(sites, linears - set(sites)))
    manifest.write(
        folder,
        manifest.Manifest(
            vlmq="0",
            source=manifest.source(source, variant),
            family="blip-2" if variant.startswith("blip2") else "llava",
            recipe={},
            tensors=records,
            kept=kept,
            files=manifest.describe(folder),
        ),
    )
    return weights


def reference(
    variant: str, weights: dict[str, QuantizedWeight], stored: torch.dtype = torch.float16, rounded: bool = False
) -> nn.Module:
    """The tiny model as the folder has it: values rounded to `stored`, linears replaced by their dequantized weights.

    `rounded`: the dequantized weights too, as a reader has them that multiplies codes and scales in that dtype.
    """
    model = tiny(variant)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).float()
    for name, weight in weights.items():
        dense = weight.dequantize()
        model.get_submodule(name).weight.data = dense.to(stored).float() if rounded else dense
    return model


def rounded_reference(
    variant: str, weights: dict[str, QuantizedWeight], inputs: Grid, limits: Limits | None = None
) -> nn.Module:
    """`reference`, every quantized linear of which reads its input as the textbook rounds it."""
    model = reference(variant, weights)
    for name in weights:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: textbook_input(args[0], inputs, limits))
    return model


def textbook_input(x: torch.Tensor, grid: Grid, limits: Limits | None = None) -> torch.Tensor:
    """x (..., in) rounded to a grid in float64; scales and quotients alone have float32's precision, by definition.

    scale = max |x| / (2**(b - 1) - 1), or (high - low) / (2**b - 1) with a zero at round(-low / scale).
    """
    rows = x.detach().reshape(-1, x.shape[-1]).double().numpy()
    if limits and grid.group != TENSOR:
        rows = np.clip(rows, np.float32(limits.low), np.float32(limits.high))
    groups = rows.reshape(len(rows), -1, rows.shape[1] if grid.group in (ROW, TENSOR) else grid.group)
    low, high = groups.min(2, keepdims=True), groups.max(2, keepdims=True)
    if grid.group == TENSOR:
        low, high = np.float32(limits.low).astype(float), np.float32(limits.high).astype(float)
    least, most = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    if grid.symmetric:
        scale = np.float32(np.maximum(-low, high) / most)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = np.float32(np.float32(high - low) / (2**grid.bits - 1))
    scale = np.where(scale == 0, np.float32(1), scale)
    zero = 0 if grid.symmetric else least + np.clip(np.rint(np.float32(-low / scale)), 0, most - least)
    codes = np.clip(np.rint(np.float32(groups / scale.astype(float))) + zero, least, most)
    return torch.from_numpy((codes - zero) * scale.astype(float)).reshape(x.shape).to(x.dtype)


def inputs(variant: str) -> dict[str, torch.Tensor]:
    """One picture and a question about it, for `generate()`; a forward of an encoder-decoder needs `forward_inputs`."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (IMAGE, IMAGE, 3), generator=generator, dtype=torch.uint8)
    text = "question : how many ? answer :" if variant.startswith("blip2") else "user : <image> how many ? assistant :"
    return dict(processor(variant)(images=Image.fromarray(pixels.numpy()), text=text, return_tensors="pt"))
