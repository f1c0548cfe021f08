"""Which token comes next: the likeliest one, or one drawn.

The filters are those of transformers, in its order: temperature, then top-k, then top-p (Holtzman et al., "The Curious
Case of Neural Text Degeneration", section 3.1).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlmq.exporter.errors import VlmqError

Choose = Callable[[np.ndarray], np.ndarray]  # logits (n, vocabulary) -> tokens (n,)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0: they are not, the likeliest is taken.

    top_k: of the so many likeliest, 0 for all. top_p: of the fewest that are at least so likely together.
    seed: the answer at place i of a batch is the one that seed + i gives alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        def refuse(name: str, remedy: str) -> None:
            raise VlmqError(f"{name} {getattr(self, name):g}: {remedy}")

        if not 0 <= self.temperature < np.inf:
            refuse("temperature", "choose 0 for the likeliest token, or a positive number")
        if self.top_k < 0:
            refuse("top_k", "choose 0 for all tokens, or a positive number")
        if not 0 < self.top_p <= 1:
            refuse("top_p", "choose a number above 0 and at most 1")
        if self.seed < 0:
            refuse("seed", "choose 0 or a positive number")
        for name in ("top_k", "top_p", "seed"):
            if self.temperature == 0 and getattr(self, name) != getattr(Sampling, name):
                refuse(name, "says nothing where the likeliest token is taken; choose a temperature above 0")


GREEDY = Sampling()


def chooser(sampling: Sampling, count: int) -> Choose:
    """Chooses the next tokens of a batch of `count`, from their logits, step by step."""
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(-1)
    sources = [np.random.default_rng(sampling.seed + place) for place in range(count)]

    def draw(logits: np.ndarray) -> np.ndarray:
        below = np.cumsum(probabilities(logits, sampling), axis=-1)
        drawn = [source.random() * row[-1] for source, row in zip(sources, below, strict=True)]
        return np.array([np.searchsorted(row, point, side="right") for row, point in zip(below, drawn, strict=True)])

    return draw


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """(n, vocabulary)  ->  (n, vocabulary) float64: how likely each token is drawn."""
    scores = logits.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = np.partition(scores, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]
        scores = np.where(scores < least, -np.inf, scores)
    if sampling.top_p < 1:
        order = np.argsort(scores, axis=-1, kind="stable")
        rising = np.take_along_axis(softmax(scores), order, axis=-1).cumsum(-1)
        out = rising <= 1 - sampling.top_p
        out[:, -1] = False
        removed = np.empty_like(out)
        np.put_along_axis(removed, order, out, axis=-1)
        scores = np.where(removed, -np.inf, scores)
    return softmax(scores)


def softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)
