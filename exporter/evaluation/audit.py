"""The audit: every tensor of an export against the checkpoint it was made from, without running either.

The manifest is made by the exporter, so an exporter at fault writes one that agrees with its faulty files. Here what
must be in the files is worked out again from the source and the recipe: which linears are quantized, and on what grids;
the tokenizer, the image processor and the configuration; every tensor that was neither quantized nor folded into; the
folds, each side against the other; and each quantized weight, which must lie as near to what it stands for as its grid
allows. Safetensors and ONNX graphs are put to the same questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.evaluation.distance import Distance
from vlmq.exporter.evaluation.expected import Expected, Fault, expected_of
from vlmq.exporter.evaluation.tensors import Tensors
from vlmq.formats import manifest, transformers_js
from vlmq.formats.errors import FormatError
from vlmq.formats.folder import companions, config_of
from vlmq.formats.stored import Graphs, Safetensors, Stored


@dataclass(frozen=True)
class Audit:
    """What was found. distances: of the quantized weights, by format, then by name on disk."""

    faults: tuple[Fault, ...] = ()
    distances: dict[str, dict[str, Distance]] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)  # name of a linear on disk to the block it is in
    compared: dict[str, int] = field(default_factory=dict)  # tensors of the source found again, by format
    disk: dict[str, dict[str, int]] = field(default_factory=dict)  # bytes by format and component
    source_disk: dict[str, int] = field(default_factory=dict)  # the source's bytes by component


def audit(folder: Path, reference: Path) -> Audit:
    """Compare the files of an export with its manifest, and both with the checkpoint in `reference`.

    VlmqError or FormatError where manifest or checkpoint cannot be read.
    """
    expected = expected_of(folder, reference)
    faults = [*_files(folder), *_companions(folder, expected.source), *_recipe(expected)]
    blocks = {expected.disk(site.name): block.name for block in expected.walk.blocks for site in block.sites}
    found = Audit(blocks=blocks, source_disk=expected.source_sizes())
    for stored in _formats(folder, expected):
        tensors = Tensors(expected, stored)
        try:
            faults.extend(tensors.faults())
        except FormatError as fault:
            faults.append(Fault("files", str(fault)))
        found.distances[stored.format] = tensors.distances
        found.compared[stored.format] = tensors.count
        found.disk[stored.format] = tensors.sizes()
    return replace(found, faults=tuple(faults))


def _files(folder: Path) -> Iterator[Fault]:
    """What the files lack of the manifest, or have besides."""
    try:
        manifest.coverage(folder)
    except FormatError as fault:
        yield Fault("files", str(fault))


def _formats(folder: Path, expected: Expected) -> Iterator[Stored]:
    """Those that can be read; what ails the others `_files` has said, or the engine that runs them will."""
    with suppress(FormatError):
        safetensors = Safetensors(folder)
        if safetensors.headers:
            yield safetensors
    with suppress(FormatError):
        if (folder / "onnx").is_dir():
            yield Graphs(folder, expected.aliases)


def _companions(folder: Path, source: Checkpoint) -> Iterator[Fault]:
    """Tokenizer, image processor, generation defaults and configuration are the source's, or what an export makes of
    them for the readers of its graphs."""
    wanted = config_of(source.folder, source.changes)
    made = {}
    with suppress(FormatError):  # graphs that are not there `_files` has missed already
        if (folder / "onnx").is_dir():
            made = transformers_js.additions(source.folder, wanted, folder / "onnx")
    wanted = made.pop("config.json", wanted)
    expected = {name: (source.folder / name).read_bytes() for name in companions(source.folder)}
    expected |= {name: transformers_js.as_text(content).encode() for name, content in made.items()}
    for name, content in expected.items():
        copy = folder / name
        if not copy.is_file():
            yield Fault("companions", f"{copy}: absent, but the reference has it; export the model again")
        elif copy.read_bytes() != content:
            yield Fault("companions", f"{copy}: not what the reference has under this name; export the model again")
    for name in sorted(set(companions(folder)) - set(expected)):
        yield Fault("companions", f"{folder / name}: the reference has none; export the model again")
    if not (folder / "config.json").is_file():
        return  # which `_files` has said already
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said.pop("quantization_config", None)
    differing = sorted(key for key in said.keys() | wanted.keys() if said.get(key) != wanted.get(key))
    if differing:
        yield Fault("companions", f"{folder / 'config.json'}: {differing[0]} is not what the reference has")


def _recipe(expected: Expected) -> Iterator[Fault]:
    """The manifest lists the linears that its recipe quantizes, on the recipe's grids, and no others."""
    schemes = {expected.disk(name): scheme for name, scheme in expected.assignment.schemes.items()}
    for module in sorted(schemes.keys() | expected.made.tensors.keys()):
        scheme, record = schemes.get(module), expected.made.tensors.get(module)
        if record is None or scheme is None:
            what = "in full precision, but the recipe quantizes it" if scheme else "quantized, but not by the recipe"
            yield Fault("recipe", f"{module}: {what}; export the model again")
        elif (record.grid, record.inputs) != (scheme.grid, scheme.inputs):
            yield Fault("recipe", f"{module}: {record.grid}, {record.inputs} where the recipe has {scheme.grid}")
