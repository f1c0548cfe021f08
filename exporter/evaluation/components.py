"""What each component puts out on held-out inputs, so that two models can be compared part by part.

vision     what the connector reads of the tower: (images, positions, width); torch only
connector  image features in the language model's space: (images, tokens, width)
language   logits of the next token: (samples, vocabulary)

A torch model can be watched block by block as well. There some of the hidden states are kept, of a few samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from vlmq.exporter.runtime import Answer

BATCH = 8
WATCHED = 4  # samples, one at a time, whose hidden states are kept, and
POSITIONS = 32  # how many positions of each: a large model's would fill gigabytes

# The module that reads the vision tower's output, in each family; LLaVA's drops the class token and the last layer.
READER = {"blip-2": "qformer", "llava": "model.multi_modal_projector"}


class Vlm(Protocol):
    """What the runtimes of `exporter/runtime.py` have in common."""

    def image_features(self, images: list[Image.Image]) -> Any: ...

    def next_logits(self, images: list[Image.Image], prompts: list[str]) -> Any: ...

    def forced_logits(self, images: list[Image.Image], prompts: list[str], answers: list[list[int]]) -> Any: ...

    def generate(self, images: list[Image.Image], prompts: list[str], max_new_tokens: int = ...) -> list[Answer]: ...


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


def blocks_of(vlm: Vlm, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """What every block of a torch model puts out: name in memory -> (positions, width); nothing of any other."""
    model = getattr(vlm, "model", None)
    if model is None:
        return {}
    kept: dict[str, list[np.ndarray]] = {name: [] for name in blocks_in(model)}

    def keep(name: str, made: Any) -> None:
        states = made[0] if isinstance(made, tuple) else made
        rows = _array(states).reshape(-1, states.shape[-1])
        kept[name].append(rows[np.linspace(0, len(rows) - 1, min(POSITIONS, len(rows))).astype(int)])

    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, given, made, name=name: keep(name, made))
        for name in kept
    ]
    try:
        for image, prompt in zip(images[:WATCHED], prompts[:WATCHED], strict=True):
            vlm.next_logits([image], [prompt])
    finally:
        for handle in handles:
            handle.remove()
    return {name: np.concatenate(states) for name, states in kept.items() if states}


def blocks_in(model: Any) -> list[str]:
    """The names of a model's blocks, in the order they run; those that are never read are left out."""
    from vlmq.exporter.families import family_of  # imports transformers, which a process without torch does later

    names = []
    for stage in family_of(model.config).stages:
        count = len(model.get_submodule(stage.path)) if not stage.single else 0
        live = stage.live(model.config) if stage.live else count
        names += [stage.path] if stage.single else [f"{stage.path}.{number}" for number in range(live)]
    return names


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


def relative_error(reference: np.ndarray, found: np.ndarray) -> float:
    """The norm of the difference as a share of the reference's; infinite where `found` holds what is no number."""
    difference = found.astype(np.float64) - reference
    if not np.isfinite(difference).all():
        return float("inf")
    return float(np.linalg.norm(difference)) / max(float(np.linalg.norm(reference)), 1e-30)
