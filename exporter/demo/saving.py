"""Write a demo model as the Hub would hold it: fp16 safetensors, configuration, tokenizer, processor."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from vlmq.exporter.demo.models import DEMOS, Model, generation_config

# transformers drops this part of CLIP's names; checkpoints on the Hub have it and other readers want it.
_SHORT, _LONG = "vision_tower.", "vision_tower.vision_model."


def save(name: str, model: Model, folder: Path) -> None:
    """Write the checkpoint file by file, each by a rename: a reader finds the old one or the new one."""
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    half = DEMOS[name].build()
    half.load_state_dict({key: value.to("cpu", copy=True) for key, value in model.state_dict().items()})
    half.generation_config = generation_config()
    half.half().save_pretrained(building)
    DEMOS[name].processor().save_pretrained(building)
    _rename_tensors(building / "model.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(building.iterdir()):
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    building.rmdir()


def _rename_tensors(path: Path) -> None:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    renamed = {
        _LONG + key.removeprefix(_SHORT) if key.startswith(_SHORT) and not key.startswith(_LONG) else key: tensor
        for key, tensor in tensors.items()
    }
    save_file(renamed, path, metadata={"format": "pt"})
