"""Answers that are given beforehand, step by step, and the logits of the steps put back together."""

from collections.abc import Sequence

import numpy as np


def said_at(answers: Sequence[Sequence[int]], step: int, fill: int) -> np.ndarray:
    """(n,) what each of n answers says at a step; `fill` where it is over."""
    return np.array([answer[step] if step < len(answer) else fill for answer in answers])


def rows_of(steps: Sequence[np.ndarray], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Steps of (n, vocabulary)  ->  for each of n answers (tokens + 1, vocabulary)."""
    return [np.stack([step[row] for step in steps[: len(answer) + 1]]) for row, answer in enumerate(answers)]
