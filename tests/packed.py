"""Exported folders made by hand from tiny models, without the pipeline: what the tests of readers read."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import IMAGE, processor, tiny, tiny_folder
from torch import nn

from vlmq.exporter.names import memory_names
from vlmq.formats import compressed_tensors, manifest
from vlmq.formats.folder import copy_companions
from vlmq.formats.shards import SafetensorsWriter
from vlmq.kernels.grid import Grid, QuantizedWeight, to_grid

Choose = Callable[[str], Grid | None]  # in-memory name of a linear to its grid; None keeps it


def packed_folder(
    variant: str, folder: Path, choose: Choose, dtype: torch.dtype = torch.float16, max_shard_bytes: int = 10**9
) -> dict[str, QuantizedWeight]:
    """Write `folder` beside `<folder>.source`; the quantized weights by in-memory name. lm_head is always kept."""
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
        records[module] = manifest.record(weights[name], "rtn")
        writer.add(compressed_tensors.pack(module, weights[name]))
    writer.close()
    sites = {name: weight.grid for name, weight in weights.items()}
    copy_companions(source, folder, compressed_tensors.quantization_config(sites, linears - set(sites)))
    manifest.write(
        folder,
        manifest.Manifest(
            vlmq="0",
            source=manifest.source(source, variant),
            family=variant,
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


def inputs(variant: str) -> dict[str, torch.Tensor]:
    """One picture and a question about it."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (IMAGE, IMAGE, 3), generator=generator, dtype=torch.uint8)
    text = "question : how many ? answer :" if variant == "blip2-opt" else "user : <image> how many ? assistant :"
    return dict(processor(variant)(images=Image.fromarray(pixels.numpy()), text=text, return_tensors="pt"))
