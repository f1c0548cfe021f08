"""The tensors of one format of an export against those of its source: kept ones, folds, and quantized weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq.exporter.evaluation.distance import Distance, distance
from vlmq.exporter.evaluation.expected import Expected, Fault
from vlmq.exporter.walk import Input, Source
from vlmq.formats import manifest
from vlmq.formats.errors import FormatError
from vlmq.formats.manifest import TensorRecord, digest, digest_of
from vlmq.formats.stored import Stored, sizes_of
from vlmq.kernels.grid import QuantizedWeight

FOLDED = 1e-2  # relative error of a folded bias: both sides are rounded to 16 bits
BIAS = 1e-3  # smaller ones say little of a scale in 16 bits
TURNED = 1e-3  # of a rotated tensor's largest value: another machine rounds its products differently


@dataclass(frozen=True)
class _Scale:
    """What was folded (channels,), float64, and its relative standard error."""

    value: Tensor
    unsure: Tensor


ONE = _Scale(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


class Tensors:
    """One format of the export against what is expected of it."""

    def __init__(self, expected: Expected, stored: Stored) -> None:
        self.expected, self.stored = expected, stored
        self.distances: dict[str, Distance] = {}  # of quantized weights, by name on disk
        self.count = 0  # tensors of the source that were found
        self.folded = {  # what makes an input, where it was divided by a scale that the readers took
            entry.source.name: entry.source
            for block in expected.walk.blocks
            for entry in block.inputs
            if entry.source and self._takes_scale(entry)
        }
        self.readers = {
            site.name: entry.source.name
            for block in expected.walk.blocks
            for entry in block.inputs
            for site in entry.sites
            if entry.source and entry.source.name in self.folded
        }
        self.scales: dict[str, _Scale] = {}  # of what is folded
        self.unfolded: list[Fault] = []

    def _takes_scale(self, entry: Input) -> bool:
        records = [self.expected.record(site.name) for site in entry.sites]
        return any(record is not None and record.fold is not None for record in records)

    def faults(self) -> Iterator[Fault]:
        yield from self._packed()
        for site in self.expected.walk.sites:
            record = self.expected.record(site.name)
            if record is not None:
                yield from self._weight(site.name, record)
        yield from self.unfolded
        yield from self._plain()

    def _packed(self) -> Iterator[Fault]:
        """What is packed is what the manifest lists."""
        named = self.stored.format == "onnx"
        listed = {
            site.name if named else self.expected.disk(site.name)
            for site in self.expected.walk.sites
            if (record := self.expected.record(site.name)) and record.stored != manifest.DENSE
        }
        tied = set(self.expected.aliases) if named else set()
        for module in sorted(self.stored.names() - listed):
            if f"{module}.weight" not in tied:
                yield Fault("files", f"{module}: packed in {self.stored.format}, but not listed so; export it again")

    def _scale(self, name: str) -> _Scale:
        """What a norm, or rows of a linear, was divided by: 1 where nothing was folded into it."""
        if name not in self.folded:
            return ONE
        if name not in self.scales:
            self.scales[name] = self._find_scale(self.folded[name])
        return self.scales[name]

    def _find_scale(self, source: Source) -> _Scale:
        """Found in the weight; a linear's is rounded, so its bias tells it more exactly. Notes where they differ."""
        name, rows = source.name, source.rows or slice(None)
        record = self.expected.record(name)
        rounding = torch.finfo(self.expected.source.dtype(f"{name}.weight")).eps / 2
        wanted_bias, bias = self._pair(f"{name}.bias")
        if record is not None:
            scale, unsure = self._row_scale(name, record, rows)
        else:
            wanted, found = self._pair(f"{name}.weight")
            if wanted is None or found is None:
                self.unfolded.append(Fault("folds", f"{name}.weight: absent in {self.stored.format}"))
                return ONE
            if wanted.ndim > 1:  # a linear that was left in full precision
                wanted, found = wanted[rows].norm(dim=1), found[rows].norm(dim=1)
            scale = _ratio(wanted, found)
            unsure = torch.full_like(scale, rounding)
        if wanted_bias is not None and bias is not None and not self._rounds_biases(name):
            wanted_bias, bias = wanted_bias[rows], bias[rows]
            if record is not None:
                told = bias.abs() > BIAS
                scale = torch.where(told, _ratio(wanted_bias, bias), scale)
                unsure = torch.where(told, rounding, unsure)
            error = (bias - wanted_bias / scale).abs().max() / bias.abs().max().clamp(min=BIAS)
            if not error <= FOLDED:
                self.unfolded.append(Fault("folds", f"{name}.bias: not divided by the scale that its weight was"))
        if not bool((scale.isfinite() & (scale > 0)).all()):
            self.unfolded.append(Fault("folds", f"{name}: divided by what is no positive scale; export it again"))
            return ONE
        return _Scale(scale, unsure)

    def _row_scale(self, name: str, record: TensorRecord, rows: slice) -> tuple[Tensor, Tensor]:
        """What rows of a quantized linear were divided by, as near as their codes tell, and how near that is."""
        stored = self.stored.weight(name, self.expected.disk(name), record)
        if stored is None:
            return ONE.value, ONE.unsure
        found = _dense(stored)[rows].double()
        columns = self._scale(self.readers.get(name, "")).value
        wanted = self.expected.source.read(f"{name}.weight")[rows].double() * columns
        along, size = (found * wanted).sum(1), (wanted * wanted).sum(1).clamp(min=1e-30)
        scale = torch.where(along > 0, size / along, torch.ones_like(along))
        rest = (found * scale.unsqueeze(1) - wanted) * wanted
        return scale, rest.square().sum(1).sqrt() / size

    def _rounds_biases(self, name: str) -> bool:
        scheme = self.expected.assignment.schemes.get(name)
        return scheme is not None and scheme.options.biases

    def _pair(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """A tensor of the source and of the export, float64."""
        if name not in self.expected.source.places:
            return None, None
        wanted = self.expected.source.read(name)
        found = self.stored.tensor(name, self.expected.source.places[name].name, wanted)
        return wanted.double(), None if found is None else found.double()

    def _weight(self, name: str, record: TensorRecord) -> Iterator[Fault]:
        disk = self.expected.disk(name)
        try:
            stored = self.stored.weight(name, disk, record)
        except FormatError as fault:
            yield Fault("files", str(fault))
            return
        if stored is None:
            yield Fault("files", f"{disk}: not in {self.stored.format}, but {manifest.NAME} lists it; export it again")
            return
        if (digest(stored) if isinstance(stored, QuantizedWeight) else digest_of(stored)) != record.sha256:
            yield Fault("hashes", f"{disk}: its weights in {self.stored.format} are not those {manifest.NAME} hashed")
        if tuple(stored.shape) != record.shape or (
            isinstance(stored, QuantizedWeight) and stored.grid.stored != record.grid.stored
        ):
            yield Fault("files", f"{disk}: on another grid in {self.stored.format} than {manifest.NAME} lists")
            return
        wanted = self.expected.source.read(f"{name}.weight").double()
        if wanted.shape != stored.shape:
            yield Fault("tensors", f"{disk}: of shape {tuple(stored.shape)}, the source's is {tuple(wanted.shape)}")
            return
        columns = self._scale(self.readers.get(name, ""))
        wanted = wanted * columns.value
        if name in self.folded:
            part = self.folded[name].rows or slice(None)
            wanted[part] = wanted[part] / self._scale(name).value.unsqueeze(-1)
        parts = [slice(*part) for part in record.rows] if record.rows else None
        self.distances[disk] = distance(_dense(stored), wanted.float(), record.grid, parts, columns.unsure)
        self.count += 1

    def _plain(self) -> Iterator[Fault]:
        """Every tensor that was neither quantized nor folded into is the source's."""
        skipped = {f"{name}.weight" for name in self.expected.assignment.schemes if self.expected.record(name)}
        for name, place in self.expected.source.places.items():
            module, _, part = name.rpartition(".")
            rounded = part == "bias" and self._rounds_biases(module)
            if name in skipped or module in self.folded or rounded:
                continue
            wanted = self.expected.source.read(name)
            found = self.stored.tensor(name, place.name, wanted)
            if found is None:
                if self.stored.format == "safetensors":  # graphs leave out what is never read
                    yield Fault("tensors", f"{place.name}: absent in the export; export the model again")
                continue
            self.count += 1
            if not self._same(name, wanted, found):
                yield Fault("tensors", f"{place.name}: in {self.stored.format} not what the source has, though kept")

    def _same(self, name: str, wanted: Tensor, found: Tensor) -> bool:
        if found.shape != wanted.shape:
            return False
        if name in self.expected.source.transforms:
            size = wanted.float().abs().max()
            return bool((found.float() - wanted.float()).abs().max() <= TURNED * size)
        exact = found.dtype == wanted.dtype or self.stored.format == "onnx"
        return exact and torch.equal(found.float(), wanted.float())

    def sizes(self) -> dict[str, int]:
        """Bytes by component; `other` is what the graphs computed from tensors and named anew."""
        sizes: dict[str, int] = {}
        of = self.expected.components(disk=self.stored.format == "safetensors")
        for name, size in sizes_of(self.stored).items():
            component = of.get(name) or of.get(name.rpartition(".")[0]) or "other"
            sizes[component] = sizes.get(component, 0) + size
        return sizes


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    return torch.where(other != 0, one / torch.where(other != 0, other, torch.ones_like(other)), 1.0)


def _dense(stored: QuantizedWeight | Tensor) -> Tensor:
    return stored.dequantize() if isinstance(stored, QuantizedWeight) else stored.float()
