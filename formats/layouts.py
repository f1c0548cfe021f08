"""The layouts that quantized linears may have in safetensors, by the names people know them by, and what each can do.

Each layout is defined in a file of its own; here they get one face, for what reads or writes any of them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vlmq.formats import awq_layout, compressed_tensors, gptq_layout
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.errors import FormatError
from vlmq.formats.parts import Parts
from vlmq.kernels.grid import Grid, QuantizedWeight

Aliases = Mapping[str, Iterable[str]]


@dataclass(frozen=True)
class Layout:
    """One layout. Its functions are those of its file, whose docstrings hold; names are those of linears."""

    stored: str  # what the manifest calls it
    config: Mapping[str, str]  # the entries of `quantization_config` that tell it from others
    parts: tuple[str, ...]  # last parts of its tensors' names; every weight has the first
    scales: torch.dtype | None  # None: the source's
    general: bool  # any linear or embedding may have it, and its input be rounded; else its readers name exceptions
    pack: Callable[[str, QuantizedWeight, Grids], dict[str, Tensor]]
    unpack: Callable[[str, Mapping[str, Tensor], Grid], QuantizedWeight]
    layout: Callable[[tuple[int, int], Grids], Parts]
    refuse: Callable[[str, tuple[int, int], Grids], None]
    quantization_config: Callable[[Mapping[str, Grids], Iterable[str], Aliases], dict]
    grids: Callable[[Mapping, Iterable[str]], dict[str, Grids]]


def _gptq(version: str) -> Layout:
    return Layout(
        stored=version,
        config=gptq_layout.CONFIGS[version],
        parts=gptq_layout.PARTS,
        scales=torch.float16,
        general=False,
        pack=lambda name, weight, grids: gptq_layout.pack(version, name, weight),
        unpack=partial(gptq_layout.unpack, version),
        layout=lambda shape, grids: gptq_layout.layout(shape, grids.weight),
        refuse=partial(gptq_layout.refuse, version),
        quantization_config=partial(gptq_layout.quantization_config, version),
        grids=gptq_layout.grids,
    )


LAYOUTS = {
    "compressed-tensors": Layout(
        stored=compressed_tensors.FORMAT,
        config=compressed_tensors.CONFIG,
        parts=compressed_tensors.PARTS,
        scales=None,
        general=True,
        pack=lambda name, weight, grids: compressed_tensors.pack(name, weight, grids.inputs, grids.limits),
        unpack=compressed_tensors.unpack,
        layout=lambda shape, grids: compressed_tensors.layout(shape, grids.weight, grids.inputs),
        refuse=lambda name, shape, grids: None,  # it holds every grid
        quantization_config=lambda sites, kept, aliases: compressed_tensors.quantization_config(sites, kept),
        grids=compressed_tensors.grids,
    ),
    "awq": Layout(
        stored=awq_layout.NAME,
        config=awq_layout.CONFIG,
        parts=awq_layout.PARTS,
        scales=torch.float16,
        general=False,
        pack=lambda name, weight, grids: awq_layout.pack(name, weight),
        unpack=awq_layout.unpack,
        layout=lambda shape, grids: awq_layout.layout(shape, grids.weight),
        refuse=awq_layout.refuse,
        quantization_config=awq_layout.quantization_config,
        grids=awq_layout.grids,
    ),
    "gptq": _gptq(gptq_layout.V1),
    "gptq-v2": _gptq(gptq_layout.V2),
}
STORED = {layout.stored: layout for layout in LAYOUTS.values()}
PARTS = frozenset(part for layout in LAYOUTS.values() for part in layout.parts)


def of_config(config: Mapping) -> Layout:
    """The layout that a `quantization_config` describes; FormatError where it is none of LAYOUTS."""
    for layout in LAYOUTS.values():
        if {key: config.get(key) for key in layout.config} == layout.config:
            return layout
    said = " ".join(str(config[key]) for key in ("quant_method", "format", "version") if key in config)
    raise FormatError(f"config.json: quantized as {said}; this reads {', '.join(LAYOUTS)}")
