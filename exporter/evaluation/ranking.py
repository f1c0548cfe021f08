"""Ranks in retrieval: where the right text is among all texts for an image, and the right image for a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_CELLS = 1 << 24  # similarities of queries held at once: 64 MB
OUT = -np.inf  # the score of what was not among the first


def similarity(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """images (n, queries, width), texts (m, width)  ->  (n, m): the similarity of the closest query."""
    count, queries, _ = images.shape
    found = np.empty((count, len(texts)), dtype=np.float32)
    step = max(1, _CELLS // max(1, queries * len(texts)))
    for start in range(0, count, step):
        found[start : start + step] = (images[start : start + step] @ texts.T).max(axis=1)
    return found


def first(scores: np.ndarray, count: int) -> np.ndarray:
    """(n, m)  ->  (n, m) bool: the `count` highest of each row; of equal ones the earlier."""
    places = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, places, True, axis=1)
    return chosen


def ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """scores, right (n, m)  ->  (n,): how many wrong ones score at least as high as the best right one; 0 is a hit.

    Equal scores count against the model: one that scores everything alike finds nothing.
    """
    best = np.where(right, scores, OUT).max(axis=1, keepdims=True)
    return ((scores >= best) & ~right).sum(axis=1)


def belonging(owners: Sequence[int], images: int) -> np.ndarray:
    """owners (m,): the image of each text  ->  (images, m) bool."""
    return np.arange(images)[:, None] == np.asarray(owners)[None, :]
