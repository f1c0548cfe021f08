"""`load(folder)`: an exported folder, or any checkpoint of a supported family, as a transformers model ready to run.

transformers' own `from_pretrained` reads exported folders too, and makes every weight dense. Here quantized linears
stay packed: each becomes a `QuantizedLinear` straight from its words, one at a time, so that the full-precision
model never exists in memory. Where it rounds its input, config.json says to what grid and vlmq.json within what limits.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PretrainedConfig, PreTrainedModel

from vlmq.exporter.families import family_of
from vlmq.exporter.names import memory_names
from vlmq.exporter.skeleton import skeleton, untie
from vlmq.formats import compressed_tensors, layouts, manifest
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.errors import FormatError
from vlmq.formats.layouts import Layout
from vlmq.formats.shards import headers
from vlmq.kernels.embedding import QuantizedEmbedding
from vlmq.kernels.grid import TENSOR, QuantizedWeight
from vlmq.kernels.linear import QuantizedLinear


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a local folder, in eval mode, computing in `dtype`; nothing is fetched and no code of it is run.

    FormatError where the folder's tensors are not exactly those of the model: absent, unknown, or of another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder}: no config.json there; name the folder of an exported model")
    if not headers(folder):
        raise FormatError(f"{folder}: no safetensors there; convert the model with transformers' save_pretrained")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return _load_plain(folder, dtype)
    del config.quantization_config  # or the model would call itself quantized by transformers' own reader
    return _load_packed(folder, config, quantization, dtype)


def _load_plain(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    _refuse(folder, "absent", info["missing_keys"])
    _refuse(folder, "not part of the model", info["unexpected_keys"])
    return model.eval()


def _load_packed(folder: Path, config: PretrainedConfig, quantization: dict, dtype: torch.dtype) -> PreTrainedModel:
    model = skeleton(config, dtype)
    layout = layouts.of_config(quantization)
    kinds = nn.Linear | nn.Embedding if layout.general else nn.Linear
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    grids = layout.grids(quantization, names)
    tensors = _Tensors(folder, model)
    head = family_of(config).loose_head
    if head and any(f"{head[0]}.{part}" in tensors.disk for part in ("weight", *layout.parts)):
        untie(model, f"{head[0]}.weight")
    for name, complete in _with_limits(folder, grids, tensors, layout).items():
        module = model.get_submodule(name)
        quantized = _embedding if isinstance(module, nn.Embedding) else _quantized
        model.set_submodule(name, quantized(name, complete, module, tensors, layout))
        if dtype == torch.float16 and module.weight.dtype == torch.float32:  # of what overflows in float16, as T5's wo
            model.get_submodule(name).register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
    _tie_heads(model)
    dense = {name: parameter for name, parameter in model.state_dict().items() if parameter.is_meta}
    model.load_state_dict(_dense(folder, dense, tensors), strict=False, assign=True)
    _refuse(folder, "not part of the model", _unknown(tensors, model))

    missing = set(dense) - set(tensors.used)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    _refuse(folder, "absent", missing)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


class _Tensors:
    """The tensors of a folder by their names in memory, each read when asked for; `used` are those that were."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.headers = headers(folder)
        self.disk = {memory: disk for disk, memory in memory_names(self.headers, model).items()}
        self.memory = {disk: memory for memory, disk in self.disk.items()}
        files = {header.file for header in self.headers.values()}
        self.files = {name: safe_open(folder / name, "pt") for name in files}
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        disk = self.disk[name]
        self.used.add(name)
        return self.files[self.headers[disk].file].get_tensor(disk)


def _embedding(name: str, grids: Grids, embedding: nn.Module, tensors: _Tensors, layout: Layout) -> QuantizedEmbedding:
    assert isinstance(embedding, nn.Embedding)
    weight = _unpacked(name, grids, embedding.weight, tensors, layout)
    return QuantizedEmbedding.from_weight(weight, embedding.weight.dtype)


def _tie_heads(model: PreTrainedModel) -> None:
    """A head that is tied to a packed embedding computes from the embedding's codes; another embedding is that one."""
    for weight, source in list(model.all_tied_weights_keys.items()):
        embedding, name = model.get_submodule(source.removesuffix(".weight")), weight.removesuffix(".weight")
        if isinstance(embedding, QuantizedEmbedding):
            looks_up = isinstance(model.get_submodule(name), nn.Embedding)
            model.set_submodule(name, embedding if looks_up else QuantizedLinear(embedding.packed))
            del model.all_tied_weights_keys[weight]


def _unpacked(name: str, grids: Grids, full: Tensor, tensors: _Tensors, layout: Layout) -> QuantizedWeight:
    """A packed weight, of the shape of the full one."""
    parts = {f"{name}.{part}": tensors[f"{name}.{part}"] for part in layout.parts if f"{name}.{part}" in tensors.disk}
    weight = layout.unpack(name, parts, grids.weight)
    compressed_tensors.check_input(name, parts, grids)
    if weight.shape != full.shape:
        raise FormatError(
            f"{name}: packed as {tuple(weight.shape)} where config.json describes "
            f"{tuple(full.shape)}; export the model again"
        )
    return weight


def _quantized(name: str, grids: Grids, linear: nn.Module, tensors: _Tensors, layout: Layout) -> QuantizedLinear:
    assert isinstance(linear, nn.Linear)
    weight = _unpacked(name, grids, linear.weight, tensors, layout)
    bias = None
    if linear.bias is not None:
        if f"{name}.bias" not in tensors.disk:
            raise FormatError(f"{name}.bias: absent; export the model again")
        bias = tensors[f"{name}.bias"].to(linear.bias.dtype)
    return QuantizedLinear.from_weight(weight, bias, inputs=grids.inputs, limits=grids.limits)


def _dense(folder: Path, dense: dict[str, Tensor], tensors: _Tensors) -> dict[str, Tensor]:
    """What is not quantized, in the dtype the skeleton has for it."""
    state = {}
    for name, expected in dense.items():
        if name not in tensors.disk:
            continue
        tensor = tensors[name]
        if tensor.shape != expected.shape:
            raise FormatError(
                f"{folder}: {name} has shape {tuple(tensor.shape)} where config.json describes "
                f"{tuple(expected.shape)}; export the model again"
            )
        state[name] = tensor.to(expected.dtype)
    return state


def _unknown(tensors: _Tensors, model: PreTrainedModel) -> list[str]:
    """Names in the files that nothing used, less those that transformers knows to be left over from old releases."""
    harmless = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"position_ids$"]
    return [
        name
        for name in tensors.disk
        if name not in tensors.used and not any(re.search(pattern, name) for pattern in harmless)
    ]


def _with_limits(folder: Path, grids: dict[str, Grids], tensors: _Tensors, layout: Layout) -> dict[str, Grids]:
    """The grids of config.json, with the limits that vlmq.json has; where it is, it must say the same of the rest."""
    if not (folder / manifest.NAME).is_file():
        lost = sorted(name for name, found in grids.items() if found.inputs and found.inputs.group == TENSOR)
        if lost:
            raise FormatError(
                f"{folder / manifest.NAME}: absent, but has the limits of {lost[0]}; fetch the whole folder"
            )
        return grids
    listed = {}
    for module, entry in manifest.read(folder).tensors.items():
        if entry.stored == manifest.DENSE:
            continue
        name = tensors.memory.get(f"{module}.{layout.parts[0]}", module)
        listed[name.removesuffix(f".{layout.parts[0]}")] = entry.grids
    said = {name: replace(entry, limits=None) for name, entry in listed.items()}
    differing = sorted(name for name in said.keys() | grids.keys() if said.get(name) != grids.get(name))
    if differing:
        raise FormatError(
            f"{differing[0]}: {manifest.NAME} says {said.get(differing[0])}, config.json "
            f"{grids.get(differing[0])}; export the model again"
        )
    return listed


def _refuse(folder: Path, what: str, names: Iterable[str]) -> None:
    found = sorted(names)
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise FormatError(f"{folder}: {found[0]}{more} {what}; fetch or export the model again")
