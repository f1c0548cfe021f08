"""safetensors files: what a folder of them holds, and a writer that streams into shards.

The layout of one file: u64 length of the header, the header (JSON, padded with spaces to 8 bytes), then the tensors'
bytes without gaps. https://github.com/huggingface/safetensors#format
"""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmq.formats.errors import FormatError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9  # as transformers' save_pretrained
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """Where a tensor is and what it looks like, read without its bytes."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


def weight_files(folder: Path) -> list[Path]:
    """The files that make up a checkpoint, as transformers chooses them: those of the index, else the single one.

    Other safetensors beside them (adapters, a consolidated copy) are not part of it. FormatError for a broken index
    or a shard that it names and that is not there.
    """
    index, single = folder / INDEX, folder / SINGLE
    if not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise FormatError(f"{index}: not an index of shards; get it again") from None
    for name in names:
        if not (folder / name).is_file():
            raise FormatError(f"{folder / name}: the shard is missing, {INDEX} names it; get it again")
    return [folder / name for name in names]


def headers(folder: Path) -> dict[str, Header]:
    """Every tensor in the safetensors files of a folder. FormatError for a broken file or a tensor in two of them."""
    found: dict[str, Header] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in found:
                        raise FormatError(f"{path}: {name} is in {found[name].file} too; fetch the model again")
                    tensor = file.get_slice(name)
                    found[name] = Header(path.name, BY_NAME[tensor.get_dtype()], tuple(tensor.get_shape()))
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
        except KeyError as error:
            raise FormatError(f"{path}: tensors of type {error.args[0]} are not supported") from None
    return found


def read_ahead(file: Path, names: Iterable[str]) -> None:
    """Ask the system to bring tensors of a file into its page cache meanwhile: a hint, which waits for nothing."""
    if not hasattr(os, "posix_fadvise"):
        return
    wanted = set(names)
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        for name, entry in json.loads(opened.read(length)).items():
            if name in wanted:
                first, last = entry["data_offsets"]
                os.posix_fadvise(opened.fileno(), 8 + length + first, last - first, os.POSIX_FADV_WILLNEED)


class SafetensorsWriter:
    """Streams tensors into `folder`: one `model.safetensors`, or numbered shards and their index.

    Memory holds one tensor at a time. A header comes before the bytes it describes and is known only after them, so
    the bytes wait in spool files beside the result; one spool per element size, the largest first in the result,
    which aligns every tensor as readers that map the file need. The same tensors in the same order give the same bytes.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.total = 0  # bytes of all tensors so far
        self._shards: list[list[str]] = []  # names in every finished shard
        self._names: set[str] = set()
        self._open = _Shard(folder)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Append tensors in the order given. FormatError for a name that was added before."""
        for name, tensor in tensors.items():
            if name in self._names:
                raise FormatError(f"{name}: written twice")
            if self._open.bytes and self._open.bytes + tensor.nbytes > self.max_shard_bytes:
                self._finish()
            self._names.add(name)
            self._open.add(name, tensor.detach())
            self.total += tensor.nbytes

    def close(self) -> list[Path]:
        """Finish the last shard, name the shards, write the index where there are several; the files written."""
        self._finish()
        count = len(self._shards)
        if count == 1:
            final = [self.folder / SINGLE]
        else:
            final = [self.folder / f"model-{shard + 1:05}-of-{count:05}.safetensors" for shard in range(count)]
        for shard, path in enumerate(final):
            self._part(shard).rename(path)
        if count == 1:
            return final
        where = {name: path.name for path, names in zip(final, self._shards, strict=True) for name in names}
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(where.items()))}
        path = self.folder / INDEX
        path.write_text(json.dumps(index, indent=2) + "\n")
        return [*final, path]

    def _part(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05}.part"

    def _finish(self) -> None:
        self._shards.append(self._open.finish(self._part(len(self._shards))))
        self._open = _Shard(self.folder)


@dataclass
class _Spool:
    """The bytes of a shard's tensors of one element size, in the order they came."""

    path: Path
    file: BinaryIO
    entries: list[tuple[str, str, list[int], int]] = field(default_factory=list)  # name, dtype, shape, bytes


class _Shard:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0
        self.spools: dict[int, _Spool] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.dtype.itemsize
        if size not in self.spools:
            path = self.folder / f"spool-{size}.part"
            self.spools[size] = _Spool(path, path.open("wb"))
        spool = self.spools[size]
        spool.file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        spool.entries.append((name, DTYPES[tensor.dtype], list(tensor.shape), tensor.nbytes))
        self.bytes += tensor.nbytes

    def finish(self, path: Path) -> list[str]:
        """Write header and spools to `path`; the names written."""
        spools = [self.spools[size] for size in sorted(self.spools, reverse=True)]
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        start = 0
        for spool in spools:
            for name, dtype, shape, size in spool.entries:
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
                start += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for spool in spools:
                spool.file.close()
                with spool.path.open("rb") as waiting:
                    shutil.copyfileobj(waiting, file, 2**24)
                spool.path.unlink()
        return [name for name in header if name != "__metadata__"]
