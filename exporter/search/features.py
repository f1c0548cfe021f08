"""Image features of any number of models: none is found twice, whichever other components of a model change.

The vision encoder's outputs are kept for models of equal vision encoders, the features for those of equal connectors
too: of 343 configurations 7 run the first and 49 the second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmq.exporter.families import TOWERS
from vlmq.exporter.inference.once import instead
from vlmq.exporter.search.kept import Kept

PIXELS = 32  # images of a batch of the vision encoder


class Features:
    """Of the pixels (images, 3, height, width), for models of one family.

    elsewhere: the modules that have no part in it: the language model and its head.
    """

    def __init__(self, pixels: Tensor, family: str, elsewhere: Iterable[str]) -> None:
        self.pixels, self.tower, self.elsewhere = pixels, TOWERS[family], tuple(elsewhere)
        self.seen: Kept[list[Any]] = Kept(lambda outputs: sum(map(_bytes, outputs)))
        self.found: Kept[Tensor] = Kept(lambda features: features.nbytes)

    def of(self, model: PreTrainedModel) -> Tensor:
        """(images, image tokens, width)"""
        return self.found.get(fingerprint(model, self.elsewhere), lambda: self._found(model))

    def _found(self, model: PreTrainedModel) -> Tensor:
        tower = model.get_submodule(self.tower)
        batches = self.pixels.split(PIXELS)
        seen = self.seen.get(fingerprint(tower), lambda: [None] * len(batches))  # filled by the tower's calls
        parts = []
        for number, pixels in enumerate(batches):
            with _remembering(tower, seen, number, self.seen.limit):
                found = model.get_image_features(pixels.to(model.device), return_dict=True).pooler_output  # type: ignore[operator]
            parts.append(found if isinstance(found, Tensor) else torch.stack(list(found)))
        self.seen.trim()
        return torch.cat(parts)


@contextmanager
def _remembering(tower: nn.Module, seen: list[Any], number: int, limit: int) -> Iterator[None]:
    """Meanwhile a call of the tower gives what it gave to this batch before, or keeps what it gives.

    limit: bytes of all batches together, beyond which none is kept.
    """
    forward = tower.forward

    def remembered(*args: Any, **kwargs: Any) -> Any:
        if seen[number] is not None:
            return seen[number]
        output = forward(*args, **kwargs)
        if _bytes(output) * len(seen) <= limit:
            seen[number] = output
        return output

    with instead(tower, remembered):
        yield


def fingerprint(module: nn.Module, without: tuple[str, ...] = ()) -> str | None:
    """Of all that a module computes with, but for some parts; None where hooks change what it computes."""
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        if f"{name}.".startswith(tuple(f"{other}." for other in without)):
            continue
        if part._forward_pre_hooks or part._forward_hooks:
            return None
        digest.update(f"{name} {type(part).__name__}\n".encode())
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            digest.update(tensor.cpu().detach().numpy().tobytes())
    return digest.hexdigest()


def _bytes(output: Any) -> int:
    """Of all tensors in a model's output."""
    if isinstance(output, Tensor):
        return output.nbytes
    if isinstance(output, dict):
        return sum(map(_bytes, output.values()))
    return sum(map(_bytes, output)) if isinstance(output, tuple | list) else 0
