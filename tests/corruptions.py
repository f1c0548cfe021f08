"""Faults that an exporter could have, done to a good export, in safetensors or in ONNX graphs.

An `Export` is edited as a model is named in memory; `close` writes it. `agree` then makes the manifest say that all is
well, as a faulty exporter would: what is caught after it is not caught by a hash.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmq.exporter.checkpoint import Checkpoint, open_checkpoint
from vlmq.formats import compressed_tensors, genai, manifest
from vlmq.formats.onnx_graphs import GRIDS
from vlmq.kernels import nbits, products
from vlmq.kernels.grid import Limits, QuantizedWeight, between


@dataclass(frozen=True)
class Names:
    """Where a family keeps what is corrupted, in memory."""

    vision: str  # blocks
    language: str
    projector: str  # a linear
    seen: str  # of a vision block: the linear that makes what it attends to
    norm: str  # of a vision block: a norm with a bias, that a scale was folded into
    spoken: str  # of a language block: the same
    folded: str  # a linear with a bias, that a scale was folded into
    positions: str  # of the vision tower
    patches: str
    classes: str
    words: str  # the token embedding


NAMES = {
    "blip-2": Names(
        vision="vision_model.encoder.layers",
        language="language_model.model.decoder.layers",
        projector="language_projection",
        seen="self_attn.qkv",
        norm="layer_norm1",
        spoken="self_attn_layer_norm",
        folded="language_model.model.decoder.layers.1.fc1",
        positions="vision_model.embeddings.position_embedding",
        patches="vision_model.embeddings.patch_embedding.weight",
        classes="vision_model.embeddings.class_embedding",
        words="language_model.model.decoder.embed_tokens.weight",
    ),
    "llava": Names(
        vision="model.vision_tower.encoder.layers",
        language="model.language_model.layers",
        projector="model.multi_modal_projector.linear_2",
        seen="self_attn.v_proj",
        norm="layer_norm1",
        spoken="input_layernorm",
        folded="model.vision_tower.encoder.layers.1.self_attn.v_proj",
        positions="model.vision_tower.embeddings.position_embedding.weight",
        patches="model.vision_tower.embeddings.patch_embedding.weight",
        classes="model.vision_tower.embeddings.class_embedding",
        words="model.language_model.embed_tokens.weight",
    ),
}


class Files(Protocol):
    """The tensors of one format, by their names in memory."""

    def weight(self, name: str) -> QuantizedWeight: ...
    def put(self, name: str, weight: QuantizedWeight) -> None: ...
    def tensor(self, name: str) -> Tensor: ...
    def put_tensor(self, name: str, tensor: Tensor) -> None: ...
    def make_dense(self, name: str, weight: Tensor) -> None: ...
    def close(self) -> None: ...


class Packed:
    """model.safetensors, compressed-tensors."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self.path = folder / "model.safetensors"
        self.places, self.made = checkpoint.places, manifest.read(folder)
        self.tensors = load_file(self.path)

    def disk(self, name: str) -> str:
        return self.places[f"{name}.weight"].name.removesuffix(".weight")

    def weight(self, name: str) -> QuantizedWeight:
        disk = self.disk(name)
        return compressed_tensors.unpack(disk, self.tensors, self.made.tensors[disk].grids.weight)

    def put(self, name: str, weight: QuantizedWeight) -> None:
        self.tensors |= compressed_tensors.pack(self.disk(name), weight)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[self.places[name].name]

    def put_tensor(self, name: str, tensor: Tensor) -> None:
        self.tensors[self.places[name].name] = tensor.to(self.tensor(name).dtype).contiguous()

    def make_dense(self, name: str, weight: Tensor) -> None:
        disk = self.disk(name)
        for part in compressed_tensors.PARTS:
            self.tensors.pop(f"{disk}.{part}", None)
        self.tensors[f"{disk}.weight"] = weight.contiguous()

    def close(self) -> None:
        save_file(self.tensors, self.path, {"format": "pt"})


ALIASES = {"language_model.model.decoder.embed_tokens.weight": "language_model.lm_head.weight"}


class Graphs:
    """The graphs in onnx/, and where in them each initializer is."""

    def __init__(self, folder: Path) -> None:
        graphs = sorted((folder / "onnx").glob("*.onnx"))
        # onnxruntime-genai's graph has no weights: its table is that of the token embedding.
        self.models = {path: onnx.load(path) for path in graphs if not path.name.startswith(genai.MERGE)}
        self.values = {value.name: value for model in self.models.values() for value in model.graph.initializer}
        self.grids = {}
        for model in self.models.values():
            for entry in model.metadata_props:
                if entry.key == GRIDS:
                    self.grids |= json.loads(entry.value)

    def _array(self, name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(self.values[name]).copy())

    def _put(self, name: str, tensor: Tensor) -> None:
        array = tensor.numpy().astype(numpy_helper.to_array(self.values[name]).dtype)
        self.values[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    def weight(self, name: str) -> QuantizedWeight:
        bits, group, symmetric, columns, dtype, kind = self.grids[name]
        tensors = {part: self._array(f"{name}.{part}") for part in products.PARTS if f"{name}.{part}" in self.values}
        tensors["scales"] = tensors["scales"].to(getattr(torch, dtype.removeprefix("torch.")))
        return products.unpack(tensors, kind, columns, compressed_tensors.Grid(bits, group, symmetric))

    def put(self, name: str, weight: QuantizedWeight) -> None:
        for part, tensor in products.pack(nbits.pack(weight), self.grids[name][-1]).items():
            if f"{name}.{part}" in self.values:
                self._put(f"{name}.{part}", tensor)

    def tensor(self, name: str) -> Tensor:
        return self._array(ALIASES.get(name, name))

    def put_tensor(self, name: str, tensor: Tensor) -> None:
        name = ALIASES.get(name, name)
        self._put(name, tensor.reshape(self._array(name).shape))

    def make_dense(self, name: str, weight: Tensor) -> None:
        for model in self.models.values():
            for node in model.graph.node:
                if f"{name}.qweight" in node.input:
                    plain = numpy_helper.from_array(weight.float().T.contiguous().numpy(), "projector_weight")
                    model.graph.initializer.append(plain)
                    node.CopyFrom(helper.make_node("MatMul", [node.input[0], plain.name], list(node.output)))
                    for entry in model.metadata_props:
                        if entry.key == GRIDS:
                            entry.value = json.dumps({k: v for k, v in json.loads(entry.value).items() if k != name})

    def decoder(self) -> onnx.ModelProto:
        return next(model for path, model in self.models.items() if path.name.startswith("decoder"))

    def close(self) -> None:
        for path, model in self.models.items():
            data = path.with_name(f"{path.name}_data")
            data.unlink(missing_ok=True)
            path.unlink()
            onnx.save_model(model, path, save_as_external_data=True, location=data.name, size_threshold=1024)


class Export:
    """A copy of a good export of one format, its reference, and what is edited of it."""

    def __init__(self, good: Path, folder: Path, reference: Path) -> None:
        shutil.copytree(good, folder, copy_function=os.link)
        for path in list(folder.rglob("*")):
            if path.is_file():  # a link no more: the good export stays as it is
                content = path.read_bytes()
                path.unlink()
                path.write_bytes(content)
        self.folder, self.source = folder, open_checkpoint(str(reference))
        self.made = manifest.read(folder)
        self.format = "onnx" if (folder / "onnx").is_dir() else "safetensors"
        self.files = self._open()
        self.names = NAMES[self.made.family]
        self.edited = False  # beyond reading

    def _open(self) -> Files:
        return Graphs(self.folder) if self.format == "onnx" else Packed(self.folder, self.source)

    @property
    def quantized(self) -> list[str]:
        """In-memory names of the quantized linears."""
        disk = {place.name.removesuffix(".weight"): name for name, place in self.source.places.items()}
        return [disk[module].removesuffix(".weight") for module in self.made.tensors]

    def change(self, names: list[str], how: Callable[[QuantizedWeight], QuantizedWeight]) -> None:
        for name in names:
            self.files.put(name, how(self.files.weight(name)))

    def swap(self, one: str, other: str) -> None:
        first, second = self.files.weight(one), self.files.weight(other)
        self.files.put(one, second)
        self.files.put(other, first)

    def change_tensor(self, name: str, how: Callable[[Tensor], Tensor]) -> None:
        self.files.put_tensor(name, how(self.files.tensor(name)))

    def change_json(self, name: str, how: Callable[[dict], None]) -> None:
        path = self.folder / name
        content = json.loads(path.read_text())
        how(content)
        path.write_text(json.dumps(content))

    def block(self, component: str, number: int) -> list[str]:
        start = f"{getattr(self.names, component)}.{number}."
        return [name for name in self.quantized if name.startswith(start)]

    def agree(self) -> None:
        """Make the manifest agree with the files."""
        packed = None if self.edited else self._open()
        records = dict(self.made.tensors)
        for name in self.quantized:
            disk = self.source.places[f"{name}.weight"].name.removesuffix(".weight")
            if packed is None or disk not in self.made.tensors:
                continue
            digest = manifest.digest(packed.weight(name))
            records[disk] = self.made.tensors[disk].model_copy(update={"sha256": digest})
        update = {"tensors": records, "files": manifest.describe(self.folder)}
        manifest.write(self.folder, self.made.model_copy(update=update))

    def write(self) -> None:
        if not self.edited:
            self.files.close()

    def rewrite(self, **update: object) -> None:
        self.made = self.made.model_copy(update=update)


def swapped_nibbles(weight: QuantizedWeight) -> QuantizedWeight:
    return replace(weight, codes=weight.codes.unflatten(1, (-1, 2)).flip(-1).flatten(1))


def zero_off_by_one(weight: QuantizedWeight) -> QuantizedWeight:
    return replace(weight, zero=torch.where(weight.zero == 0, weight.zero + 1, weight.zero - 1))


def _all(how: Callable[[QuantizedWeight], QuantizedWeight]) -> Callable[[Export], None]:
    return lambda export: export.change(export.quantized, how)


def _component(component: str, how: Callable[[QuantizedWeight], QuantizedWeight]) -> Callable[[Export], None]:
    def corrupt(export: Export) -> None:
        start = getattr(export.names, component)
        export.change([name for name in export.quantized if name.startswith(start)], how)

    return corrupt


def _rotate_qkv(export: Export) -> None:
    for number in range(4):
        block = f"{export.names.vision}.{number}.self_attn"
        if export.made.family == "blip-2":
            name = f"{block}.qkv"
            third = export.files.weight(name).shape[0] // 3
            export.change([name], lambda weight, third=third: _rows(weight, torch.arange(3 * third).roll(third)))
        else:
            export.swap(f"{block}.q_proj", f"{block}.k_proj")
            export.swap(f"{block}.k_proj", f"{block}.v_proj")


def _rows(weight: QuantizedWeight, order: Tensor) -> QuantizedWeight:
    return replace(weight, codes=weight.codes[order], scale=weight.scale[order], zero=weight.zero[order])


def _swap_blocks(component: str) -> Callable[[Export], None]:
    def corrupt(export: Export) -> None:
        for one, other in zip(export.block(component, 1), export.block(component, 2), strict=True):
            export.swap(one, other)

    return corrupt


def _swap_key_and_value(export: Export) -> None:
    for number in range(4):
        block = f"{export.names.language}.{number}.self_attn"
        export.swap(f"{block}.k_proj", f"{block}.v_proj")


def _unquantized(export: Export) -> None:
    """As if the exporter had passed the projector by, and written so."""
    name = export.names.projector
    weight = export.source.read(f"{name}.weight")
    disk = export.source.places[f"{name}.weight"].name.removesuffix(".weight")
    export.files.make_dense(name, weight)
    tensors = {module: record for module, record in export.made.tensors.items() if module != disk}
    export.rewrite(tensors=tensors, kept={**export.made.kept, disk: "projector"})
    if export.format == "safetensors":

        def leave_out(config: dict) -> None:
            config["quantization_config"]["ignore"].append(f"re:.*{name.rpartition('.')[2]}$")

        export.change_json("config.json", leave_out)


def _silently_quantized(export: Export) -> None:
    """The recipe keeps the tower, the files do not."""
    recipe = dict(export.made.recipe)
    recipe["components"] = {**recipe.get("components", {}), "vision": {"bits": 16}}
    export.rewrite(recipe=recipe)


def _silently_rounded(export: Export) -> None:
    def rounded(tensor: Tensor) -> Tensor:
        matrix = tensor.flatten(1).float()
        scale = matrix.abs().amax(1, keepdim=True) / 3
        return ((matrix / scale).round() * scale).reshape(tensor.shape)

    export.change_tensor(export.names.patches, rounded)


def _restore(*tensors: Callable[[Names], str]) -> Callable[[Export], None]:
    """What was folded into is as in the source, as if the fold had passed it by."""

    def corrupt(export: Export) -> None:
        for name in (tensor(export.names) for tensor in tensors):
            if name in export.source.places:
                export.files.put_tensor(name, export.source.read(name))

    return corrupt


def _spoken(names: Names, number: int = 1) -> str:
    return f"{names.language}.{number}.{names.spoken}"


def _folded_twice(export: Export) -> None:
    for part in ("weight", "bias"):
        name = f"{_spoken(export.names)}.{part}"
        if name in export.source.places:
            source = export.source.read(name).float()
            export.change_tensor(name, lambda now, source=source: now.float() ** 2 / source)


def _tensor(of: Callable[[Names], str], how: Callable[[Tensor], Tensor]) -> Callable[[Export], None]:
    return lambda export: export.change_tensor(of(export.names), how)


def _json(name: str, how: Callable[[dict], None]) -> Callable[[Export], None]:
    return lambda export: export.change_json(name, how)


def _shift_tokens(tokenizer: dict) -> None:
    words = tokenizer["model"]["vocab"]
    plain = [word for word in words if words[word] > 4]  # the special tokens keep their ids
    ids = [words[word] for word in plain]
    words.update(zip(plain, [*ids[1:], ids[0]], strict=True))


def _processor(**settings: object) -> Callable[[Export], None]:
    return _json("processor_config.json", lambda config: config["image_processor"].update(settings))


def _other_end(config: dict) -> None:
    config["eos_token_id"] = 6  # a full stop


def _text(**settings: object) -> Callable[[Export], None]:
    return _json("config.json", lambda config: config["text_config"].update(settings))


def _vision(**settings: object) -> Callable[[Export], None]:
    return _json("config.json", lambda config: config["vision_config"].update(settings))


def _cache_off_by_one(export: Export) -> None:
    """What the decoder hands on lies one position from where it was."""
    assert isinstance(export.files, Graphs)
    graph = export.files.decoder().graph
    for name in [output.name for output in graph.output if output.name.endswith(".key")]:
        whole = f"{name}/whole"
        for node in graph.node:
            for field in (node.input, node.output):
                for place, used in enumerate(field):
                    if used == name:
                        field[place] = whole
        for value, number in (("zero", 0), ("one", 1), ("two", 2), ("end", 2**40)):
            graph.initializer.append(numpy_helper.from_array(np.array([number]), f"{name}/{value}"))
        graph.node.append(
            helper.make_node("Slice", [whole, *[f"{name}/{v}" for v in ("one", "end", "two")]], [f"{name}/a"])
        )
        graph.node.append(
            helper.make_node("Slice", [whole, *[f"{name}/{v}" for v in ("zero", "one", "two")]], [f"{name}/b"])
        )
        graph.node.append(helper.make_node("Concat", [f"{name}/a", f"{name}/b"], [name], axis=2))


def _wrong_limits(export: Export) -> None:
    """An input's range a quarter of what was seen, in the manifest as in the files."""
    assert isinstance(export.files, Packed)
    records = dict(export.made.tensors)
    for module, record in records.items():
        assert record.limits is not None
        assert record.inputs is not None
        limits = Limits(record.limits[0] / 4, record.limits[1] / 4)
        records[module] = record.model_copy(update={"limits": (limits.low, limits.high)})
        scale, _ = between(torch.tensor([limits.low]), torch.tensor([limits.high]), record.inputs, torch.float32)
        export.files.tensors[f"{module}.input_scale"] = scale
    export.rewrite(tensors=records)


def _cut_short(export: Export) -> None:
    export.files.close()
    (path,) = (
        export.folder.glob("onnx/vision_encoder*.onnx_data")
        if export.format == "onnx"
        else [export.folder / "model.safetensors"]
    )
    path.write_bytes(path.read_bytes()[:-4096])
    export.edited = True


def _one_code(export: Export) -> None:
    def off(weight: QuantizedWeight) -> QuantizedWeight:
        codes = weight.codes.clone()
        codes[0, 0] ^= 1
        return replace(weight, codes=codes)

    export.change([export.block("language", 1)[0]], off)


def _coarse(weight: QuantizedWeight) -> QuantizedWeight:
    """One bit fewer than said."""
    codes = (weight.codes.float() / 2).round().clamp(max=7) * 2
    return replace(weight, codes=codes.to(torch.uint8))


def _blind(export: Export) -> None:
    export.change([export.names.projector], lambda weight: replace(weight, scale=weight.scale * 0 + 1e-6))


def _group_of_a_row(weight: QuantizedWeight) -> QuantizedWeight:
    scale = weight.scale.clone()
    scale[:, 0] = scale[:, 0] * 3
    return replace(weight, scale=scale)


@dataclass(frozen=True)
class Corruption:
    """What is done, and what must tell once the manifest agrees.

    audit: checks of the files that must name it, each perhaps one of several (`a|b`); none: the files say nothing.
    answers: whether those of what the model puts out must name it too.
    """

    do: Callable[[Export], None]
    audit: tuple[str, ...]
    answers: bool
    formats: tuple[str, ...]


def _told(do: Callable[[Export], None], audit: str = "", answers: bool = False, formats: str = "") -> Corruption:
    return Corruption(do, tuple(audit.split()), answers, tuple(formats.split()) or ("safetensors", "onnx"))


def _seen(do: Callable[[Export], None], audit: str = "", formats: str = "") -> Corruption:
    return _told(do, audit, True, formats)


CORRUPTIONS: dict[str, Corruption] = {
    "nibbles swapped": _seen(_all(swapped_nibbles), "steps"),
    "zero points off by one": _told(_all(zero_off_by_one), "steps shift"),
    "scales shifted by a group": _told(_all(lambda w: replace(w, scale=w.scale.roll(1, 1))), "shift"),
    "scales of the tower doubled": _seen(_component("vision", lambda w: replace(w, scale=w.scale * 2)), "steps"),
    "a group's scales tripled": _seen(_component("vision", _group_of_a_row), "shift"),
    "codes shifted by a column": _seen(_component("language", lambda w: replace(w, codes=w.codes.roll(1, 1))), "steps"),
    "codes shifted by a row": _seen(_component("vision", lambda w: replace(w, codes=w.codes.roll(1, 0))), "steps"),
    "codes upside down": _seen(_component("vision", lambda w: replace(w, codes=15 - w.codes)), "steps"),
    "q, k, v in another order": _told(_rotate_qkv, "steps"),
    "keys and values exchanged": _seen(_swap_key_and_value, "steps"),
    "vision blocks exchanged": _told(_swap_blocks("vision"), "steps"),
    "language blocks exchanged": _told(_swap_blocks("language"), "steps"),
    "rows of the projector turned round": _seen(
        lambda export: export.change([export.names.projector], lambda w: _rows(w, torch.arange(len(w.codes)).flip(0))),
        "steps",
    ),
    "the projector blind": _seen(_blind, "steps"),
    "the projector unquantized": _told(_unquantized, "recipe"),
    "the tower quantized though kept": _told(_silently_quantized, "recipe"),
    "the patch embedding rounded": _told(_silently_rounded, "tensors"),
    "a norm not folded": _told(
        _restore(lambda names: f"{_spoken(names)}.weight", lambda names: f"{_spoken(names)}.bias"), "columns"
    ),
    "a norm's bias not folded": _told(_restore(lambda names: f"{names.vision}.1.{names.norm}.bias"), "folds"),
    "a linear's bias not folded": _told(_restore(lambda names: f"{names.folded}.bias"), "folds|steps|columns"),
    "a norm folded twice": _told(_folded_twice, "columns"),
    "a bias lost": _told(_tensor(lambda names: f"{names.vision}.1.mlp.fc2.bias", torch.zeros_like), "tensors"),
    "colours in another order": _seen(_tensor(lambda names: names.patches, lambda t: t.flip(1)), "tensors"),
    "positions off by one": _told(_tensor(lambda names: names.positions, lambda t: t.roll(1, -2)), "tensors"),
    "the class token negated": _told(_tensor(lambda names: names.classes, torch.neg), "tensors"),
    "the words' rows off by one": _seen(_tensor(lambda names: names.words, lambda t: t.roll(1, 0)), "tensors"),
    "token ids shifted": _seen(_json("tokenizer.json", _shift_tokens), "companions"),
    "another image mean": _seen(_processor(image_mean=[0.0, 0.0, 0.0]), "companions"),
    "another image deviation": _told(_processor(image_std=[0.2, 0.2, 0.2]), "companions"),
    "pixels not rescaled": _seen(_processor(do_rescale=False), "companions"),
    "another end of an answer": _told(_json("generation_config.json", _other_end), "companions"),
    "the language model configured otherwise": _told(
        _text(rope_parameters={"rope_theta": 100.0, "rope_type": "default"}, activation_function="gelu"), "companions"
    ),
    "another activation in the tower": _told(_vision(hidden_act="relu"), "companions"),
    "a block fewer": _told(_text(num_hidden_layers=3), "companions"),
    "the cache off by one": _seen(_cache_off_by_one, formats="onnx"),
    "a file cut short": _told(_cut_short, "runs"),
    "one code off by one": _told(_one_code),
}
ROUNDED_INPUTS = _seen(_wrong_limits, formats="safetensors")  # of an export whose inputs have one range each
