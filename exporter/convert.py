"""Converting: an exported folder in one layout becomes a folder in another, with the same codes, scales and zeros.

Nothing is quantized again and no statistics are needed: each weight is unpacked, compared with the manifest, and packed
as the other layout has it. What is not quantized, and every file beside the weights, is copied.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

import vlmq
from vlmq.exporter import ends, release
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.names import memory_names
from vlmq.exporter.progress import Progress, silent
from vlmq.exporter.release import Release
from vlmq.exporter.skeleton import skeleton
from vlmq.formats import card, compressed_tensors, layouts, manifest
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.folder import staged
from vlmq.formats.layouts import LAYOUTS, Layout
from vlmq.formats.shards import INDEX, Header, SafetensorsWriter, headers

CONFIG = "config.json"
LANGUAGE_BLOCKS = "model.language_model.layers."  # the ones that optimum converts
PREFIXLESS = "vision_model"  # vLLM builds BLIP-2's vision tower without this name in front


@dataclass(frozen=True)
class Converted:
    """The finished folder and what is in it; note: what a person must know who loads it with other readers.

    release: what transformers made of it, where it was asked.
    """

    folder: Path
    manifest: manifest.Manifest
    note: str | None
    release: Release | None = None


def convert(
    folder: Path,
    to: str,
    output: Path,
    progress: Progress = silent,
    gate: bool = True,
) -> Converted:
    """Write `folder`, an export, to `output` in the layout `to`, one of LAYOUTS. gate: have transformers load it.

    VlmqError or FormatError in one line, and nothing is left behind: before anything is written where the folder is not
    as its manifest says or the layout cannot hold its grids, later where it cannot hold the value of a scale or a zero.
    """
    made = manifest.coverage(folder)
    found = headers(folder)
    if not found:
        raise VlmqError(
            f"{folder}: has ONNX graphs alone, which have a layout of their own; convert a safetensors export"
        )
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    source, target = layouts.of_config(config.get("quantization_config", {})), LAYOUTS[to]
    if source is target:
        raise VlmqError(f"{folder}: is in this layout already; choose another --to than {to}")
    model = _skeleton(folder)
    plan = _plan(folder, made, found, model, source)
    _refuse(plan, model, target, to)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = linears - set(plan.sites)
    config["quantization_config"] = target.quantization_config(plan.sites, kept, plan.aliases)

    with staged(output) as stage:
        records = _write(folder, found, plan, source, target, stage, progress)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (stage / CONFIG).write_text(text + "\n", encoding="utf-8")
        _copy_others(folder, stage, set(made.files) - {CONFIG, INDEX, *(header.file for header in found.values())})
        done = made.model_copy(
            update={
                "vlmq": vlmq.__version__,
                "tensors": {**made.tensors, **records},
                "files": manifest.describe(stage),
            }
        )
        manifest.write(stage, done)
        card.write(stage)
    found = release.conclude(output, gate, progress)
    return Converted(output, done, _note(plan, model, linears, to), found)


def _skeleton(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    del config.quantization_config  # or the model would call itself quantized by transformers' own reader
    return skeleton(config)


@dataclass(frozen=True)
class _Plan:
    """The packed linears: the manifest's entries and the names in memory, both by module name on disk."""

    entries: dict[str, manifest.TensorRecord]
    names: dict[str, str]
    aliases: dict[str, tuple[str, ...]]  # the other names of every linear, quantized or not, by its name in memory

    @property
    def sites(self) -> dict[str, Grids]:
        return {self.names[module]: entry.grids for module, entry in self.entries.items()}


def _plan(
    folder: Path, made: manifest.Manifest, found: Mapping[str, Header], model: PreTrainedModel, source: Layout
) -> _Plan:
    entries = {module: entry for module, entry in made.tensors.items() if entry.stored != manifest.DENSE}
    if not entries:
        raise VlmqError(f"{folder}: no weight is packed, all are stored dense; there is nothing to convert")
    other = next((module for module, entry in entries.items() if entry.stored != source.stored), None)
    if other:
        raise VlmqError(
            f"{folder}: {manifest.NAME} says {entries[other].stored} of {other}, {CONFIG} {source.stored}; "
            "export the model again"
        )
    names, aliases = {}, {}
    for tensor, memory in memory_names(found, model).items():
        module, _, part = tensor.rpartition(".")
        name = memory.rpartition(".")[0]
        if module in entries and part == source.parts[0]:
            names[module] = name
        aliases[name] = tuple({module, name.removeprefix(PREFIXLESS)} - {name})
    return _Plan(entries, names, aliases)


def _refuse(plan: _Plan, model: PreTrainedModel, target: Layout, to: str) -> None:
    """VlmqError or FormatError for the first linear that the layout, or every reader of it, has no place for."""
    if target.general:
        return
    if model.config.text_config.is_encoder_decoder:
        kind = model.config.text_config.model_type
        raise VlmqError(f"{plan.names[next(iter(plan.entries))]}: no reader of {to} takes a {kind}; keep it as it is")
    found = ends.find(model)
    exceptions = {found.embedding: "token embedding", found.head: "output head"}
    for module, entry in plan.entries.items():
        name = plan.names[module]
        # transformers converts no module that it keeps in float32, and vLLM quantizes no Q-Former
        what = exceptions.get(name) or next((part for part in _in_float32(model) if part in name.split(".")), None)
        if what:
            raise VlmqError(f"{name}: readers of {to} keep the {what} in full precision; export with it at 16 bits")
        target.refuse(name, entry.shape, entry.grids)


def _in_float32(model: PreTrainedModel) -> Iterable[str]:
    return model._keep_in_fp32_modules or ()


def _write(
    folder: Path,
    found: Mapping[str, Header],
    plan: _Plan,
    source: Layout,
    target: Layout,
    stage: Path,
    progress: Progress,
) -> dict[str, manifest.TensorRecord]:
    """Write all tensors, one at a time; what the manifest says of the repacked ones."""
    files = {file: safe_open(folder / file, "pt") for file in {header.file for header in found.values()}}
    writer = SafetensorsWriter(stage)
    records: dict[str, manifest.TensorRecord] = {}
    for name, header in found.items():
        module, _, part = name.rpartition(".")
        if module not in plan.entries or part not in source.parts:
            writer.add({name: files[header.file].get_tensor(name)})
        elif module not in records:
            names = [f"{module}.{part}" for part in source.parts if f"{module}.{part}" in found]
            stored = {name: files[found[name].file].get_tensor(name) for name in names}
            tensors, records[module] = _repacked(module, plan.entries[module], stored, source, target)
            writer.add(tensors)
            progress("linears", len(records), len(plan.entries))
    writer.close()
    return records


def _repacked(
    module: str, entry: manifest.TensorRecord, stored: Mapping[str, Tensor], source: Layout, target: Layout
) -> tuple[dict[str, Tensor], manifest.TensorRecord]:
    """The tensors of a weight in the other layout, and their record; scales get the dtype of the export back."""
    weight = source.unpack(module, stored, entry.grids.weight)
    if manifest.digest(weight) != entry.sha256:
        raise VlmqError(f"{module}: not the weight whose sha256 {manifest.NAME} has; export the model again")
    exported = getattr(torch, entry.scales) if entry.scales else weight.scale.dtype
    tensors = target.pack(module, replace(weight, scale=weight.scale.to(exported)), entry.grids)
    changed = target.scales not in (None, exported)
    return tensors, entry.model_copy(
        update={
            "stored": target.stored,
            "scales": str(exported).removeprefix("torch.") if changed else None,
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        }
    )


def _copy_others(folder: Path, stage: Path, names: set[str]) -> None:
    for path in sorted(folder.rglob("*")):  # and not the names themselves, which could lead out of the folder
        name = path.relative_to(folder)
        if name.as_posix() in names:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, stage / name)


def _note(plan: _Plan, model: PreTrainedModel, linears: Iterable[str], to: str) -> str | None:
    """Seen in transformers 5.24 with optimum 2.3 and gptqmodel 7.7: what is as they do not expect it becomes random."""
    if to == "compressed-tensors":
        return compressed_tensors.caveat(plan.sites, ends.find(model).embedding)
    if not to.startswith("gptq"):
        return None
    if model.main_input_name != "input_ids":
        return "transformers takes gptq for models whose first input is text, which this is not; use vlmq or vLLM"
    expected = {name for name in linears if name.startswith(LANGUAGE_BLOCKS)}
    if set(plan.sites) != expected or len({grids.weight for grids in plan.sites.values()}) > 1:
        return (
            "transformers takes gptq for exactly the linears of the language model's blocks, on one grid, and loads "
            "anything else wrongly; use vlmq or vLLM, or export with --vision-bits 16 --connector-bits 16"
        )
    return None
