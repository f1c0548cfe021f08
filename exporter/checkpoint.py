"""A checkpoint on disk: opened from a folder or the Hub, read tensor by tensor, never whole.

Only data is read (DESIGN.md, promise 11): safetensors and JSON. Tensors are asked for by their in-memory name;
where each lies is known from the headers alone.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.devices import CPU
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import Family, family_of
from vlmq.exporter.names import memory_names
from vlmq.exporter.skeleton import skeleton, untie
from vlmq.formats import hub, shards
from vlmq.formats.errors import FormatError
from vlmq.formats.manifest import FileRecord
from vlmq.formats.shards import weight_files

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: the file, and its name there."""

    file: Path
    name: str


@dataclass(frozen=True)
class Transform:
    """A tensor that is made of stored ones when it is read.

    `make` gets a function that reads stored tensors, each in its own dtype, by in-memory name, and returns float32.
    `source` is the stored tensor that the new one takes the place and the dtype of.
    """

    source: str
    make: Callable[[Callable[[str], Tensor]], Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A vision-language checkpoint whose weights are read when they are asked for.

    `name` is what the user called it; `revision` the commit of a Hub model. `places` maps in-memory names of
    tensors to where they lie; it is empty for a configuration without weights.

    It may be a view of what is stored: some tensors (by in-memory name) are read through `transforms`, and `config`
    differs from config.json by `changes`, entries nested as they are there.
    """

    name: str
    folder: Path
    config: PretrainedConfig
    family: Family
    revision: str | None = None
    places: dict[str, Place] = field(default_factory=dict)
    transforms: dict[str, Transform] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def skeleton(self) -> PreTrainedModel:
        """The model with every parameter on the meta device."""
        model = skeleton(self.config, torch.float32)
        if self.family.loose_head:
            head, expected = self.family.loose_head
            if f"{head}.weight" in self.places or (expected and not self.places):
                untie(model, f"{head}.weight")
        return model

    def model(self) -> PreTrainedModel:
        """The whole model in memory, float32, in eval mode."""
        model = self.skeleton()
        self.fill(model, "")
        absent = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}
        model.tie_weights(missing_keys=absent, recompute_mapping=False)
        if (self.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        return model

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in."""
        if name in self.transforms:
            return self._float(name).to(self.dtype(name))
        return self._stored(name)

    def _float(self, name: str, device: torch.device = CPU) -> Tensor:
        """One tensor in float32; a transformed one is not rounded to the dtype it would be stored in."""
        transform = self.transforms.get(name)
        made = transform.make(self._stored) if transform else self._stored(name)
        return made.to(device).float()  # on its way to a GPU it has the width that it is stored in

    def _stored(self, name: str) -> Tensor:
        place = self.places[name]
        try:
            with safe_open(place.file, framework="pt") as file:
                return file.get_tensor(place.name)
        except (SafetensorError, OSError) as error:
            raise VlmqError(f"{place.file}: cannot read {place.name} ({error}); get the file again") from error

    def read_ahead(self, prefix: str) -> None:
        """Let the system read a module's stored tensors while something else is computed."""
        by_file: dict[Path, list[str]] = {}
        for name, place in self.places.items():
            if name.startswith(f"{prefix}."):
                by_file.setdefault(place.file, []).append(place.name)
        for file, names in by_file.items():
            shards.read_ahead(file, names)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in, read from the header."""
        transform = self.transforms.get(name)
        place = self.places[transform.source if transform else name]
        with safe_open(place.file, framework="pt") as file:
            return shards.BY_NAME[file.get_slice(place.name).get_dtype()]

    def fill(self, module: nn.Module, prefix: str, recurse: bool = True, device: torch.device = CPU) -> None:
        """Give a module's parameters and persistent buffers their values, float32, all of its buffers on `device` too;
        `prefix` is its in-memory name."""
        for name, parameter in list(module.named_parameters(prefix, recurse, remove_duplicate=False)):
            if parameter.is_meta and name in self.places:
                _assign(module, _below(prefix, name), self._float(name, device))
        for name, buffer in list(module.named_buffers(prefix, recurse)):
            if name in self.places:
                buffer.copy_(self.read(name))
            path, _, leaf = _below(prefix, name).rpartition(".")
            module.get_submodule(path)._buffers[leaf] = buffer.to(device)


def _below(prefix: str, name: str) -> str:
    """The name of a tensor within the module of name `prefix`."""
    return name.removeprefix(f"{prefix}." if prefix else "")


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


def tie(model: PreTrainedModel, modules: Collection[str], stored: Collection[str]) -> None:
    """Give those of `modules` whose weight is another's, and not `stored`, that one's, where it is in memory."""
    for weight, source in model.all_tied_weights_keys.items():
        if weight.rpartition(".")[0] in modules and weight not in stored:
            _assign(model, weight, model.get_parameter(source).data)


def release(module: nn.Module, recurse: bool = True) -> None:
    """Put a module's parameters back on the meta device: their memory is free again."""
    for name, parameter in list(module.named_parameters(recurse=recurse)):
        _assign(module, name, parameter.detach().to("meta"))


def open_checkpoint(name: str, revision: str | None = None, weights: bool = True) -> Checkpoint:
    """Open a demo by its name, a local folder, or a Hub model; VlmqError in one line where that cannot be done.

    With `weights=False` the configuration is enough (`vlmq inspect`): nothing else is downloaded.
    """
    folder, revision = _find(name, revision, weights)
    config = _config(folder)
    family = family_of(config)
    if not weights and not _has_weights(folder):
        return Checkpoint(name, folder, config, family, revision)
    on_disk = _headers(folder)
    model = skeleton(config)
    try:
        names = memory_names(on_disk, model)
    except ValueError as error:
        raise VlmqError(f"{folder}: {error}") from error
    absent = sorted({name for name, _ in model.named_parameters()} - set(names.values()))
    if absent:
        raise VlmqError(
            f"{folder}: {absent[0]} and {len(absent) - 1} more tensors are absent; get the checkpoint again"
        )
    places = {names[disk]: Place(file, disk) for disk, (file, _) in on_disk.items()}
    _refuse_shapes(folder, model, {names[disk]: shape for disk, (_, shape) in on_disk.items()})
    return Checkpoint(name, folder, config, family, revision, places)


def _refuse_shapes(folder: Path, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """VlmqError for the first tensor of another shape than config.json describes."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = shapes.get(name, tuple(parameter.shape))
        if found != tuple(parameter.shape):
            raise VlmqError(
                f"{folder}: {name} has shape {found} where config.json describes {tuple(parameter.shape)}; "
                "get the checkpoint again"
            )


def _find(name: str, revision: str | None, weights: bool) -> tuple[Path, str | None]:
    if name in CHECKPOINTS:
        return CHECKPOINTS[name], None
    folder = Path(name)
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise VlmqError(f"{name}: is a file; name the checkpoint's folder")
    demos = ", ".join(CHECKPOINTS)
    missing = f"{name}: no such folder and no such Hub model; name a folder, a Hub id (user/name) or a demo ({demos})"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise VlmqError(missing)
    try:
        patterns = DOWNLOADED if weights else ["config.json"]
        found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise VlmqError(f"{name}: is gated; accept its licence on the Hub and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise VlmqError(f"{name}: has no revision {revision}; name a branch, a tag or a commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise VlmqError(missing) from error
    except (LocalEntryNotFoundError, OSError, hub.NetworkError) as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        if isinstance(cause, HfHubHTTPError):
            raise VlmqError(f"{name}: not a folder here, and {hub.in_words(cause)}") from error
        raise VlmqError(f"{name}: not a folder here, and the Hub cannot be reached; pass a local folder") from error
    return found, found.name  # a snapshot's folder is named after its commit


def refuse_altered(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """VlmqError where a file that came from the Hub has not the sha256 that the Hub knows it by.

    A downloaded large file lies in the Hub's cache under that name; huggingface_hub itself compares sizes alone.
    """
    for name, record in files.items():
        stored = (folder / name).resolve()
        if re.fullmatch("[0-9a-f]{64}", stored.name) and stored.name != record.sha256:
            raise VlmqError(f"{folder / name}: came otherwise than the Hub has it; remove {stored} and run again")


def _config(folder: Path) -> PretrainedConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise VlmqError(f"{folder}: has no config.json; name the folder of a transformers checkpoint")
    try:
        if "quantization_config" in json.loads(file.read_text()):
            raise VlmqError(f"{file}: the checkpoint is quantized already; start from the full-precision one")
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise VlmqError(f"{file}: {str(error).strip().splitlines()[0]}; vlmq exports BLIP-2 and LLaVA") from error


def _has_weights(folder: Path) -> bool:
    """Whether every weight file is there: a configuration and an index alone are enough to inspect."""
    try:
        return bool(weight_files(folder))
    except FormatError:
        return False


def _headers(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """On-disk tensor name -> file and shape, from the headers; a truncated file is found here, before any work."""
    files = weight_files(folder)
    if not files:
        pickles = [file.name for pattern in PICKLES for file in sorted(folder.glob(pattern))]
        if pickles:
            raise VlmqError(
                f"{folder}: only a pickle ({pickles[0]}), which could run code; convert it to safetensors first"
            )
        raise VlmqError(f"{folder}: has no {shards.SINGLE}; name the folder of a safetensors checkpoint")
    on_disk = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                on_disk.update({name: (file, tuple(opened.get_slice(name).get_shape())) for name in opened.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise VlmqError(f"{file}: not a whole safetensors file ({error}); get it again") from error
    return on_disk
