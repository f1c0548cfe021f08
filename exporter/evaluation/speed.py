"""Seconds, sample by sample, so that two models can be compared pair by pair: one question at a time, as it is used."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from vlmq.exporter.evaluation.components import Vlm

CLOSELY = 8  # samples whose first token, further tokens and image are timed each by itself
FURTHER = 16  # tokens after the first


@dataclass(frozen=True)
class Speed:
    """Seconds: for a whole answer, until its first token, for each token after it, and to look at an image."""

    answer: list[float]
    first_token: list[float]
    token: list[float]
    image: list[float]

    @property
    def seconds_per_answer(self) -> float:
        return statistics.median(self.answer)

    @property
    def seconds_to_first_token(self) -> float:
        return statistics.median(self.first_token)

    @property
    def tokens_per_second(self) -> float:
        return 1 / max(statistics.median(self.token), 1e-9)

    @property
    def images_per_second(self) -> float:
        return 1 / max(statistics.median(self.image), 1e-9)


def ratio(before: Sequence[float], after: Sequence[float]) -> float:
    """How many times faster: the median over pairs."""
    return statistics.median(one / max(two, 1e-9) for one, two in zip(before, after, strict=True))


def speed_of(vlm: Vlm, images: Sequence[Image.Image], prompts: Sequence[str], max_new_tokens: int) -> Speed:
    """Of a model that has answered something before: what is done once only is not timed."""
    answer, said = [], []
    for image, prompt in zip(images, prompts, strict=True):
        start = time.perf_counter()
        said.append(vlm.generate([image], [prompt], max_new_tokens=max_new_tokens)[0].tokens)
        answer.append(time.perf_counter() - start)
    first_token, token, looked = [], [], []
    closely = list(zip(images, prompts, said, strict=True))[:CLOSELY]
    for image, prompt, tokens in closely:
        long = [(list(tokens) or [0])[place % max(1, len(tokens))] for place in range(FURTHER)]
        first_token.append(_timed(partial(vlm.forced_logits, [image], [prompt], [[]])))
        whole = _timed(partial(vlm.forced_logits, [image], [prompt], [long]))
        token.append(max(whole - first_token[-1], 1e-9) / FURTHER)
        looked.append(_timed(partial(vlm.image_features, [image])))
    return Speed(answer, first_token, token, looked)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
