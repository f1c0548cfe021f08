"""Answers of one model to many samples: batched, greedy, and in the order of the samples.

Samples are batched image by image, so that a runtime sees one image object for all of a batch's questions about it
and may look at it once; images with long prompts come first, so that a batch has prompts of about equal length and
the largest batch runs before anyone has waited for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.images import open_image
from vlmq.exporter.samples import Sample, Templates, prompt_of

if TYPE_CHECKING:
    from vlmq.exporter.runtime import Answer

BATCH = 64
MAX_NEW_TOKENS = 20  # of an answer; VQA's have one to three words


class Vlm(Protocol):
    """What the runtimes of `exporter/runtime.py` have in common."""

    def generate(self, images: list[Image.Image], prompts: list[str], max_new_tokens: int = ...) -> list[Answer]: ...


def answer_all(
    vlm: Vlm,
    samples: Sequence[Sample],
    templates: Templates,
    batch_size: int = BATCH,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """The answer to every sample, at the sample's position; `progress(done, of)` is called after each batch."""
    prompts = [prompt_of(sample, templates) for sample in samples]
    answers: dict[int, Answer] = {}
    for places in batches(samples, prompts, batch_size):
        images = images_of([samples[place] for place in places])
        answered = vlm.generate(images, [prompts[place] for place in places], max_new_tokens=max_new_tokens)
        answers.update(zip(places, answered, strict=True))
        if progress:
            progress(len(answers), len(samples))
    return [answers[place] for place in range(len(samples))]


def batches(samples: Sequence[Sample], prompts: Sequence[str], batch_size: int) -> Iterator[list[int]]:
    """Positions of the samples, batch by batch."""
    by_image: dict[object, list[int]] = {}
    for place, sample in enumerate(samples):
        by_image.setdefault(sample.image, []).append(place)
    groups = sorted(by_image.values(), key=lambda places: -max(len(prompts[place]) for place in places))
    order = [place for places in groups for place in places]
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def images_of(samples: Sequence[Sample]) -> list[Image.Image]:
    """The decoded image of each sample; samples with the same image share one object."""
    opened: dict[object, Image.Image] = {}
    for sample in samples:
        if sample.image is None:
            raise VlmqError(f"{sample.id}: text without an image; evaluate on samples with images")
        if sample.image not in opened:
            opened[sample.image] = open_image(sample.image)
    return [opened[sample.image] for sample in samples]
