"""How far one model's distributions over the next token lie from another's, along the same answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROWS = 64  # positions in float64 at once


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence from the reference, nats a token; top1: percent of tokens that are the likeliest in
    both. `first` is of the answers' first tokens alone, which hang on image and question most."""

    kl: float
    first: float
    top1: float
    tokens: int


def divergence(reference: np.ndarray, found: np.ndarray, lengths: Sequence[int]) -> Divergence:
    """Logits (positions, vocabulary) of answers with `lengths` positions each, one after the other.

    Logits that are not numbers diverge without limit.
    """
    parts = [
        _divergences(reference[start : start + ROWS].astype(np.float64), found[start : start + ROWS].astype(np.float64))
        for start in range(0, len(reference), ROWS)
    ]
    each = np.concatenate(parts)
    starts = np.cumsum([0, *lengths[:-1]])
    same = np.concatenate(
        [
            reference[start : start + ROWS].argmax(-1) == found[start : start + ROWS].argmax(-1)
            for start in range(0, len(reference), ROWS)
        ]
    )
    return Divergence(float(each.mean()), float(each[starts].mean()), 100 * float(same.mean()), len(each))


def _divergences(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(n, vocabulary) twice  ->  (n,)"""
    if not np.isfinite(found).all():
        return np.full(len(found), np.inf)
    first, second = _log_softmax(reference), _log_softmax(found)
    return (np.exp(first) * (first - second)).sum(-1)


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
