"""`vlmq.json`: what was done to every tensor of an exported folder, and the check that the files say the same."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from vlmq.formats import compressed_tensors, layouts
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.errors import FormatError
from vlmq.formats.shards import Header, headers
from vlmq.kernels.grid import ROWS, Grid, Limits, QuantizedWeight

NAME = "vlmq.json"
VERSION = 1
PACKED: Literal["pack-quantized"] = "pack-quantized"  # compressed_tensors.FORMAT
DENSE: Literal["dense"] = "dense"  # on the grid in some rows only, so stored as a plain weight
WEIGHTS = ("*.safetensors", "onnx/*")  # files that may not be there without being listed


class Record(BaseModel):
    """Immutable, and strict about what it does not know: an unknown field is an error, not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    bytes: int
    sha256: str


class Source(Record):
    """The checkpoint before."""

    name: str  # folder or Hub id, as the person gave it
    revision: str | None = None
    parameters: int  # elements of all tensors in its files
    files: dict[str, FileRecord]


class Calibration(Record):
    dataset: str
    count: int
    seed: int = 0
    ids_sha256: str  # of the sample ids, in order, one a line
    images_sha256: dict[str, str] = Field(default_factory=dict)  # sample id to image


class TensorRecord(Record):
    """One quantized linear."""

    method: str
    bits: int
    group: int  # -1: the whole row; 0: the whole tensor, stored as rows that share a scale
    symmetric: bool
    shape: tuple[int, int]  # out, in
    fold: str | None = None  # what absorbed the scale of its input, in words
    stored: Literal["pack-quantized", "awq", "gptq", "gptq-v2", "dense"] = PACKED  # the layout, as in layouts.STORED
    scales: Literal["bfloat16", "float32"] | None = None  # their dtype in the export, where its layout has another
    rows: tuple[tuple[int, int], ...] | None = None  # start, stop of those on the grid; None: all
    inputs: Grid | None = None  # what its input is rounded to; None: left as it comes
    limits: tuple[float, float] | None = None  # what the input is clamped to first; None: nothing
    bytes: int  # on disk: all tensors of its layout; or the dense weight
    sha256: str  # of the dequantized weight, float32, row by row, little endian

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group, self.symmetric)

    @property
    def grids(self) -> Grids:
        """As the files know them: config.json says the same, less the limits."""
        return Grids(self.grid.stored, self.inputs, self.limits and Limits(*self.limits))


class Manifest(Record):
    version: int = VERSION
    vlmq: str  # the release that wrote it
    source: Source
    family: str
    recipe: dict[str, Any]
    calibration: Calibration | None = None
    tensors: dict[str, TensorRecord]  # by module name on disk
    kept: dict[str, str]  # linears in full precision, by module name on disk, and why
    files: dict[str, FileRecord]  # every file of the folder but this one
    onnx: dict[str, Any] | None = None


def write(folder: Path, manifest: Manifest) -> Path:
    """`folder/vlmq.json`, keys sorted: equal manifests are equal bytes."""
    path = folder / NAME
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read(folder: Path) -> Manifest:
    """FormatError where the file is absent, broken, or of a version this release does not know."""
    path = folder / NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}; name a folder that vlmq export wrote") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FormatError(f"{path}: {where + ': ' if where else ''}{first['msg']}; export the model again") from None
    if manifest.version != VERSION:
        raise FormatError(f"{path}: version {manifest.version}; this release of vlmq reads {VERSION}")
    return manifest


def record(
    weight: QuantizedWeight,
    method: str,
    fold: str | None = None,
    inputs: Grid | None = None,
    limits: Limits | None = None,
) -> TensorRecord:
    """What the manifest says of a weight, and of its input, as `compressed_tensors.pack` stores them."""
    rows, columns = weight.shape
    grid = weight.grid
    return TensorRecord(
        method=method,
        bits=grid.bits,
        group=grid.group,
        symmetric=grid.symmetric,
        shape=(rows, columns),
        fold=fold,
        inputs=inputs,
        limits=limits and (limits.low, limits.high),
        bytes=compressed_tensors.packed_bytes((rows, columns), grid, weight.scale.itemsize, inputs),
        sha256=digest(weight),
    )


def record_dense(
    weight: Tensor, grid: Grid, method: str, rows: Iterable[slice], fold: str | None = None
) -> TensorRecord:
    """What the manifest says of a weight (out, in) of which only `rows` lie on `grid`: it is stored dense."""
    outputs, columns = weight.shape
    return TensorRecord(
        method=method,
        bits=grid.bits,
        group=grid.group,
        symmetric=grid.symmetric,
        shape=(outputs, columns),
        fold=fold,
        stored=DENSE,
        rows=tuple((part.start, part.stop) for part in rows),
        bytes=weight.nbytes,
        sha256=digest_of(weight),
    )


def digest(weight: QuantizedWeight) -> str:
    """sha256 of the dequantized float32 weight, row by row, little endian: the same however it is stored."""
    return _sha256(slab.dequantize() for slab in weight.slabs())


def digest_of(weight: Tensor) -> str:
    """The same of a dense weight."""
    return _sha256(weight.split(ROWS))


def _sha256(slabs: Iterable[Tensor]) -> str:
    """Of the rows one after the other, so that none of a large weight is there twice."""
    found = hashlib.sha256()
    for slab in slabs:
        found.update(slab.float().cpu().contiguous().numpy().astype("<f4", copy=False).data)
    return found.hexdigest()


def source(folder: Path, name: str, revision: str | None = None) -> Source:
    """Hash and measure the weight files of a checkpoint folder."""
    found = headers(folder)
    return Source(
        name=name,
        revision=revision,
        parameters=sum(header.count for header in found.values()),
        files=describe(folder, sorted({header.file for header in found.values()})),
    )


def describe(folder: Path, names: Iterable[str] | None = None) -> dict[str, FileRecord]:
    """Bytes and sha256 of the named files, or of every file of the folder but the manifest."""
    if names is None:
        names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: FileRecord(bytes=(folder / name).stat().st_size, sha256=file_sha256(folder / name))
        for name in sorted(names)
        if name != NAME
    }


def file_sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            hashed.update(piece)
    return hashed.hexdigest()


def identity(folder: Path) -> str:
    """sha256 of the manifest, which has that of every other file."""
    return file_sha256(folder / NAME)


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk. `linears` are the quantized ones: codes, scales, zeros and shapes; biases are not counted."""

    linears: int
    linears_fp16: int  # the same weights at two bytes each
    weights: int  # elements of the quantized linears
    files: int  # all safetensors files: headers, biases and unquantized tensors included
    files_fp16: int  # the source's elements at two bytes each

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized linears, with scales, zeros and shapes."""
        return 8 * self.linears / self.weights

    @property
    def linears_ratio(self) -> float:
        """How many times smaller than fp16 the quantized linears are."""
        return self.linears_fp16 / self.linears

    @property
    def files_ratio(self) -> float:
        """How many times smaller than fp16 the whole checkpoint is."""
        return self.files_fp16 / self.files


def sizes(manifest: Manifest) -> Sizes:
    weights = sum(rows * columns for rows, columns in (record.shape for record in manifest.tensors.values()))
    return Sizes(
        linears=sum(record.bytes for record in manifest.tensors.values()),
        linears_fp16=2 * weights,
        weights=weights,
        files=sum(
            record.bytes for name, record in manifest.files.items() if name.endswith(".safetensors") and "/" not in name
        ),
        files_fp16=2 * manifest.source.parameters,
    )


def coverage(folder: Path, hashes: bool = True) -> Manifest:
    """The manifest, once every tensor and file it lists is there as it says, and nothing packed or unlisted besides.

    Reads headers and, with `hashes`, all bytes once. Tensors are those of the safetensors files; of a folder with
    ONNX graphs alone, the files are checked. FormatError, one line, for the first difference.
    """
    manifest = read(folder)
    _check_files(folder, manifest.files, hashes)
    both = sorted(set(manifest.tensors) & set(manifest.kept))
    if both:
        raise FormatError(f"{folder / NAME}: {both[0]} is listed as quantized and as kept; export the model again")
    found = headers(folder)
    if not found and manifest.onnx is not None:
        return manifest
    for module, entry in manifest.tensors.items():
        _check_module(module, entry, found)
    packed = {module for module, entry in manifest.tensors.items() if entry.stored != DENSE}
    for name in found:
        module, _, part = name.rpartition(".")
        if part in layouts.PARTS and module not in packed:
            raise FormatError(f"{name}: packed, but {NAME} does not list its linear so; export the model again")
    return manifest


def _check_files(folder: Path, files: Mapping[str, FileRecord], hashes: bool) -> None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise FormatError(f"{path}: absent, but {NAME} lists it; export the model again")
        if path.stat().st_size != entry.bytes:
            raise FormatError(f"{path}: {path.stat().st_size} bytes, {NAME} says {entry.bytes}; copy the folder again")
        if hashes and file_sha256(path) != entry.sha256:
            raise FormatError(f"{path}: its bytes are not those {NAME} lists; copy the folder again")
    for pattern in WEIGHTS:
        for path in sorted(folder.glob(pattern)):
            if path.relative_to(folder).as_posix() not in files:
                raise FormatError(f"{path}: not listed in {NAME}; remove it or export the model again")


def _check_module(module: str, entry: TensorRecord, found: Mapping[str, Header]) -> None:
    """Every part of the packed weight has the shape its grid gives, and together the bytes recorded."""
    dense = found.get(f"{module}.weight")
    if entry.stored == DENSE:
        if dense is None or dense.shape != entry.shape or dense.bytes != entry.bytes:
            raise FormatError(
                f"{module}.weight: not the dense weight {entry.shape} of {entry.bytes} bytes that {NAME} "
                "lists; export the model again"
            )
        return
    if dense is not None:
        raise FormatError(f"{module}.weight: stored in full beside its packed form; export the model again")
    grids = entry.grids
    expected = layouts.STORED[entry.stored].layout(entry.shape, grids)
    size = 0
    for part in sorted(layouts.PARTS):
        name = f"{module}.{part}"
        if (name in found) != (part in expected):
            raise FormatError(
                f"{name}: {'not expected' if name in found else 'absent'} for {grids}; export the model again"
            )
        if part not in expected:
            continue
        header, (dtype, shape) = found[name], expected[part]
        if (
            header.shape != shape
            or header.dtype != (dtype or header.dtype)
            or (dtype is None and not header.dtype.is_floating_point)
        ):
            raise FormatError(
                f"{name}: {header.dtype} {header.shape} in {header.file}, where {NAME} means {shape}; "
                "export the model again"
            )
        size += header.bytes
    if size != entry.bytes:
        raise FormatError(f"{module}: {size} bytes packed, {NAME} says {entry.bytes}; export the model again")
