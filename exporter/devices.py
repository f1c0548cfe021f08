"""Where blocks are calibrated and solved: on the processor, or on a GPU, from where they come back one by one."""

import os

import torch

from vlmq.exporter.errors import VlmqError

CPU = torch.device("cpu")


def device_of(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:1` means; auto: a GPU where torch sees one.

    Of several workers each has a GPU of its own, as far as there are. VlmqError for one that is not there.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not there):
        return CPU
    kind, _, index = name.partition(":")
    if (kind != "cuda" and name != "auto") or (index and not index.isdigit()):
        raise VlmqError(f"--device {name}: unknown; choose auto, cpu, cuda or cuda:1")
    number = int(index) if index else int(os.environ.get("LOCAL_RANK", "0")) % max(there, 1)
    if number >= there:
        sees = f"{there} GPUs" if there else "no GPU"
        raise VlmqError(
            f"--device {name}: torch {torch.__version__} sees {sees}; pass --device cpu, or install CUDA's torch"
        )
    return torch.device("cuda", number)
