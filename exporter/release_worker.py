"""The process of the release gate: `python -m vlmq.exporter.release_worker FOLDER WORK`, started by `release.py`.

Loads FOLDER with transformers as a user would, then with our reader, one after the other, and writes WORK/found.json.
"""

import gc
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.components import outputs_of
from vlmq.exporter.families import family_of
from vlmq.exporter.load import load
from vlmq.exporter.names import memory_names
from vlmq.exporter.runtime import TorchVlm, open_processor
from vlmq.formats import compressed_tensors, layouts, manifest
from vlmq.formats.errors import FormatError
from vlmq.formats.shards import headers
from vlmq.kernels.embedding import QuantizedEmbedding
from vlmq.kernels.linear import QuantizedLinear

TOKENS = 12  # of each answer
SIDE = 64  # pixels of the picture
KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def work(folder: Path) -> dict[str, Any]:
    """All fields of a Release but the manifest's."""
    found, theirs = by_transformers(folder)
    gc.collect()
    if not found["answers"]:
        return found
    try:
        ours = answers(dense(load(folder), found["rounded"]), folder)
    except (FormatError, VlmqError) as refused:
        return found | {"failure": f"vlmq's own reader refuses it: {refused}"}
    found["tokens"] = sum(map(len, ours["tokens"]))
    found["same_tokens"] = theirs["tokens"] == ours["tokens"]
    found["largest"] = {name: difference(theirs["outputs"][name], output) for name, output in ours["outputs"].items()}
    return found


def by_transformers(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What it says and holds, and its answers, asked for before anything else is."""
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    entries = manifest.read(folder).tensors.values()
    packed = not _is_dense(folder)
    compares = not any(entry.inputs for entry in entries)
    if packed:
        exec(compressed_tensors.UNPACK, {"model": model})  # the very line that people are told to write
    theirs = answers(model, folder) if compares else {}  # before anything else is asked of it
    keys = {kind.removesuffix("_keys"): sorted(map(str, info[kind])) for kind in KINDS}
    count, rounded, differing = compare_weights(model, folder)
    found = {
        "readers": {name: version(name) for name in ("transformers", "compressed-tensors", "torch")},
        "unpacked_by": compressed_tensors.UNPACK if packed else None,
        "keys": keys,
        "weights": count,
        "rounded": rounded,
        "differing": differing,
        "answers": compares,
    }
    return found, theirs


def _is_dense(folder: Path) -> bool:
    """Whether config.json asks for dense weights at load."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return bool(config["quantization_config"].get("dequantize"))


def compare_weights(model: PreTrainedModel, folder: Path) -> tuple[int, bool, list[str]]:
    """How many tensors of the folder were compared with those in memory, whether all packed ones are rounded to the
    precision of their scales, and the names of those that differ, bit by bit."""
    found, state = headers(folder), model.state_dict()
    names = memory_names(found, model)
    entries = {name: entry for name, entry in manifest.read(folder).tensors.items() if entry.stored != manifest.DENSE}
    files = {file: safe_open(folder / file, "pt") for file in {header.file for header in found.values()}}
    layout = layouts.STORED[next(iter(entries.values())).stored] if entries else layouts.LAYOUTS["compressed-tensors"]
    exact, rounded, differing = 0, 0, []
    count = 0
    for disk, header in found.items():
        module, _, part = disk.rpartition(".")
        packed = module in entries and part in layout.parts
        if packed and part != layout.parts[0]:
            continue
        name = names[disk].removesuffix(part) + "weight" if packed else names[disk]
        count += 1
        held = state.get(name)
        if held is None or not packed:
            if held is None or not torch.equal(held, files[header.file].get_tensor(disk).to(held.dtype)):
                differing.append(name)
            continue
        parts = [f"{module}.{part}" for part in layout.parts if f"{module}.{part}" in found]
        tensors = {name: files[found[name].file].get_tensor(name) for name in parts}
        weight = layout.unpack(module, tensors, entries[module].grids.weight)
        solved = weight.dequantize()
        if torch.equal(held, solved.to(held.dtype)):
            exact += 1
        elif torch.equal(held, solved.to(weight.scale.dtype).to(held.dtype)):
            rounded += 1
        else:
            differing.append(name)
    return count, rounded > 0, differing


def dense(model: PreTrainedModel, rounded: bool) -> PreTrainedModel:
    """Our reader's model with every packed weight dequantized, in the precision of its scales where `rounded`."""
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a T5's embedding has three names
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            weight = module.quantized()
            values = weight.dequantize().to(weight.scale.dtype) if rounded else weight.dequantize()
            bias = module.bias if isinstance(module, QuantizedLinear) else None
            model.set_submodule(name, _module(module, values.float(), bias))
    return model


def _module(packed: nn.Module, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    if isinstance(packed, QuantizedEmbedding):
        return nn.Embedding.from_pretrained(weight, freeze=True)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear


@torch.inference_mode()
def answers(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Greedy tokens of two prompts about a picture of noise, generated first, and what each component puts out."""
    vlm = TorchVlm(model, open_processor(folder))
    family = family_of(model.config)
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    images = [Image.fromarray(noise)] * 2
    prompts = [family.question.format("what is in the picture?"), family.caption]
    tokens = [answer.tokens for answer in vlm.generate(images, prompts, TOKENS)]
    return {"tokens": tokens, "outputs": outputs_of(vlm, images, prompts)}


def difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    """The largest difference, of the largest value; infinite where one has another shape or is not finite."""
    if theirs.shape != ours.shape or not np.isfinite(theirs).all():
        return float("inf")
    return float(np.abs(theirs - ours).max() / max(float(np.abs(ours).max()), 1e-30))


def main() -> int:
    found = work(Path(sys.argv[1]))
    (Path(sys.argv[2]) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
