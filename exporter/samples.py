"""Samples: an image with what is asked about it, for calibration and for evaluation.

Sources of samples are read by `sources.py`; this file knows what a sample is, how some are drawn from many, and how
to make sure that none of those calibrated on is evaluated on.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.images import digest

COUNT = 128  # samples of a calibration, as the AWQ and GPTQ papers have it
IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Sample:
    """One image-text pair.

    kind: `question` goes into the family's question template; `caption` is the family's caption request and has no
    text; `prompt` is used as it is written (see `prompt_of`). answers: of the annotators, or reference captions.
    """

    id: str  # unique within a source
    image: Path | None  # None for text alone, which is read only when asked for
    kind: Literal["question", "caption", "prompt"]
    text: str | None = None
    answers: tuple[str, ...] = ()
    answer_type: str | None = None  # VQAv2's yes/no, number or other

    def __post_init__(self) -> None:
        if (self.kind == "caption") != (self.text is None):
            raise ValueError(f"{self.id}: a caption request has no text, a {self.kind} has")


@dataclass(frozen=True)
class Samples:
    """The samples of one source, and the name under which it can be found again (with its revision, if it has one)."""

    source: str
    samples: tuple[Sample, ...]


class Templates(Protocol):
    """What a family knows about prompts."""

    question: str  # with {} for the question
    caption: str


def prompt_of(sample: Sample, templates: Templates) -> str:
    """The text that the family's processor is given.

    A `prompt` is a prompt already, unless the family marks the image's place and it does not: then it is a question.
    Text alone has no image to mark.
    """
    prompt = _with_image(sample, templates)
    return prompt if sample.image is not None else re.sub(rf"{IMAGE_MARK}\n?", "", prompt)


def _with_image(sample: Sample, templates: Templates) -> str:
    if sample.text is None:
        return templates.caption
    lacks_image = IMAGE_MARK in templates.question and IMAGE_MARK not in sample.text
    if sample.kind == "question" or lacks_image:
        return templates.question.format(sample.text)
    return sample.text


def draw(samples: Iterable[Sample], count: int = COUNT, seed: int = 0) -> tuple[Sample, ...]:
    """`count` samples (or all, if there are fewer) without replacement, the same for any order of `samples`.

    They are the first by a hash of seed and id, so that a smaller draw is the beginning of a larger one.
    """
    if count < 1:
        raise VlmqError(f"{count} samples: at least one is needed; choose a larger number")

    def rank(sample: Sample) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed}:{sample.id}".encode()).digest(), sample.id

    return tuple(sorted(samples, key=rank)[:count])


def ids_sha256(samples: Iterable[Sample]) -> str:
    """SHA-256 of the ids in their order, one a line."""
    return hashlib.sha256("\n".join(sample.id for sample in samples).encode()).hexdigest()


def image_digests(samples: Iterable[Sample]) -> dict[str, str]:
    """Id of every sample with an image -> the image's digest; an image of several samples is read once.

    VlmqError with the first sample whose image cannot be read.
    """
    digest_of = cache(digest)
    found = {}
    for sample in samples:
        if sample.image is None:
            continue
        try:
            found[sample.id] = digest_of(sample.image)
        except VlmqError as fault:
            raise VlmqError(f"sample {sample.id}: {fault}") from None
    return found


def refuse_leakage(calibration: Iterable[str], evaluation: Sequence[Sample]) -> None:
    """VlmqError when an image of `evaluation` is among `calibration`, the digests of the images calibrated on.

    All of them are decoded, so that one that cannot be is known before hours of work.
    """
    seen = frozenset(calibration)
    digests = image_digests(evaluation)
    leaked = [sample for sample in evaluation if digests.get(sample.id) in seen]
    if leaked:
        first = leaked[0]
        raise VlmqError(
            f"{first.image}: the image of evaluation sample {first.id} was calibrated on, as were those of "
            f"{len(leaked) - 1} more; evaluate on other images, or calibrate on others"
        )


def refuse_repeated_ids(source: object, samples: Iterable[Sample]) -> None:
    """VlmqError naming the source and the first id that two samples share."""
    id_, times = max(Counter(sample.id for sample in samples).items(), key=lambda item: item[1], default=("", 0))
    if times > 1:
        raise VlmqError(f"{source}: id {id_} occurs {times} times; give every sample an id of its own")
