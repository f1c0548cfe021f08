"""What each component puts out on held-out inputs, so that two models can be compared part by part.

vision     what the connector reads of the tower: (images, positions, width); torch only
connector  image features in the language model's space: (images, tokens, width)
language   logits of the next token: (samples, vocabulary)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from PIL import Image

BATCH = 8

# The module that reads the vision tower's output, in each family; LLaVA's drops the class token and the last layer.
READER = {"blip-2": "qformer", "llava": "model.multi_modal_projector"}


class Vlm(Protocol):
    """What the runtimes of `exporter/runtime.py` have in common."""

    def image_features(self, images: list[Image.Image]) -> Any: ...

    def next_logits(self, images: list[Image.Image], prompts: list[str]) -> Any: ...


def outputs_of(vlm: Vlm, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Outputs by component, float32; `vision` only where `vlm` is a torch model, whose modules can be watched."""
    parts: dict[str, list[np.ndarray]] = {"vision": [], "connector": [], "language": []}
    for start in range(0, len(images), BATCH):
        some, said = list(images[start : start + BATCH]), list(prompts[start : start + BATCH])
        with _watched(vlm) as seen:
            parts["connector"].append(_array(vlm.image_features(some)))
        parts["vision"] += seen
        parts["language"].append(_array(vlm.next_logits(some, said)))
    return {name: np.concatenate(part) for name, part in parts.items() if part}


@contextmanager
def _watched(vlm: Vlm) -> Iterator[list[np.ndarray]]:
    """Collects what the connector is given while the context is open."""
    seen: list[np.ndarray] = []
    model = getattr(vlm, "model", None)
    if model is None:
        yield seen
        return

    def keep(module: object, positional: tuple, named: dict) -> None:
        seen.append(_array(named["encoder_hidden_states"] if "encoder_hidden_states" in named else positional[0]))

    handle = model.get_submodule(READER[model.config.model_type]).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().float().cpu() if hasattr(value, "detach") else value, dtype=np.float32)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """The mean cosine of the vectors along the last axis, from -1 to 1.

    Two zero vectors are alike; a zero vector and another, or one that is not finite, are not: 0.
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    both_zero = (first == 0).all(-1) & (second == 0).all(-1)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    known = np.isfinite(norms) & (norms > 0)
    cosines = np.divide((first * second).sum(-1), norms, out=np.zeros_like(norms), where=known)
    return float(np.where(both_zero, 1.0, cosines).mean())
