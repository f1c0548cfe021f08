"""What a quantizer cost, from the start of its process until its output is written; and its weights, made dense."""

import json
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

STARTED = float(os.environ.get("STARTED", time.time()))  # the process, in seconds since 1970
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in which the system counts


def cost(folder: Path, *packages: str) -> None:
    """Write FOLDER/cost.json: wall and CPU seconds, peak resident memory, versions. Call it before `save_dense`."""
    used, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        "wall_s": time.time() - STARTED,
        "cpu_s": used.ru_utime + used.ru_stime + below.ru_utime + below.ru_stime,
        "peak_bytes": max(used.ru_maxrss, below.ru_maxrss) * MAXRSS_UNIT,
        "versions": {name: version(name) for name in (*packages, "torch", "transformers")},
    }
    (folder / "cost.json").write_text(json.dumps(found, indent=1) + "\n")


def save_dense(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write FOLDER/dense.safetensors: a decoder's weights in fp32, under the names they have in a Llama.

    weights: name in any model that has one -> tensor; what is not of a decoder layer, or the last norm, is left out.
    """
    found = {}
    for name, weight in weights.items():
        place = name.find("layers.")
        if name.endswith("model.norm.weight"):
            found["norm.weight"] = weight
        elif place >= 0 and "vision" not in name:
            found[name[place:]] = weight
    save_file(
        {name: weight.detach().float().contiguous() for name, weight in found.items()}, folder / "dense.safetensors"
    )


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def by_module(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        found.setdefault(module, {})[leaf] = tensor
    return found


def unpack(folder: Path, added: int) -> dict[str, torch.Tensor]:
    """The weights of a folder in AutoGPTQ's or AutoAWQ's layout of 4 bits, dense; other tensors as they are.

    AutoGPTQ: qweight (in / 8, out), a row's nibbles are 8 rows from the lowest on; qzeros (groups, out / 8), to which
    `added` is added. AutoAWQ: qweight (in, out / 8) and qzeros, whose nibbles hold columns 0, 2, 4, 6, 1, 3, 5, 7.
    Both: scales (groups, out).
    """
    weights = {}
    for module, tensors in by_module(load_all(folder)).items():
        if "qweight" not in tensors:
            weights |= {f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()}
            continue
        words, scale = tensors["qweight"], tensors["scales"].float()
        if words.shape[1] == scale.shape[1]:
            codes = _nibbles(words.T).T
            zero = _nibbles(tensors["qzeros"]) + added
        else:
            order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
            codes, zero = (
                _nibbles(packed).unflatten(1, (-1, 8))[..., order].flatten(1) for packed in (words, tensors["qzeros"])
            )
        group = tensors.get("g_idx", torch.arange(len(codes)) // (len(codes) // len(scale))).long()
        weights[f"{module}.weight"] = ((codes - zero[group]) * scale[group]).T
    return weights


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """(rows, words) int32  ->  (rows, 8 * words): each word's nibbles, the lowest first."""
    return ((words.unsqueeze(2) >> (4 * torch.arange(8))) & 15).flatten(1)
