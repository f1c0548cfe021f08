"""The multiple-choice knapsack: one choice for every item, the least cost within a budget of bytes.

By dominance (Nemhauser and Ullmann 1969; Kellerer, Pferschy and Pisinger, "Knapsack Problems", 11.5): item by item,
of all sums so far only those are kept that no other beats in both bytes and cost. That is exact, and quick where
blocks are alike, since their sums then coincide. Beyond LIMIT sums, the cheapest of every slice of bytes is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LIMIT = 100_000  # sums kept


@dataclass(frozen=True)
class Choices:
    """What one item may be: bytes (n,) int64 and cost (n,) float64 of each choice."""

    bytes: np.ndarray
    cost: np.ndarray


@dataclass(frozen=True)
class Solution:
    """The place of each item's choice, and their sums. exact: no sum was given up that might have led to less cost."""

    chosen: tuple[int, ...]
    bytes: int
    cost: float
    exact: bool


def solve(items: Sequence[Choices], budget: int, limit: int = LIMIT) -> Solution | None:
    """The choices of least cost whose bytes do not exceed the budget; of equal cost, fewest bytes. None: none fit."""
    least_after = np.cumsum([0, *(item.bytes.min() for item in reversed(items))])[::-1]  # bytes of items to come
    if least_after[0] > budget:
        return None
    size, cost = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each kept sum: the sum before it, and the choice
    exact = True
    for item, least in zip(items, least_after[1:], strict=True):
        sizes = (size[:, None] + item.bytes).ravel()
        costs = (cost[:, None] + item.cost).ravel()
        kept = _undominated(sizes, costs, budget - least)
        if len(kept) > limit:
            exact = False
            kept = _thinned(kept, sizes[kept], limit)
        steps.append((kept // len(item.bytes), kept % len(item.bytes)))
        size, cost = sizes[kept], costs[kept]
    place = len(cost) - 1  # sums rise in bytes and fall in cost
    chosen = []
    total = int(size[place]), float(cost[place])
    for before, choice in reversed(steps):
        chosen.append(int(choice[place]))
        place = before[place]
    return Solution(tuple(reversed(chosen)), *total, exact)


def _undominated(sizes: np.ndarray, costs: np.ndarray, budget: int) -> np.ndarray:
    """Places of the sums within the budget that none of as few bytes undercuts, by rising bytes."""
    order = np.lexsort((costs, sizes))
    order = order[sizes[order] <= budget]
    falling = costs[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(falling)[:-1]])
    return order[falling < before]


def _thinned(kept: np.ndarray, sizes: np.ndarray, limit: int) -> np.ndarray:
    """The first and, of every one of `limit` equal slices of bytes, the largest and so the cheapest."""
    low, high = int(sizes[0]), int(sizes[-1])
    slices = ((sizes - low).astype(np.float64) / max(1, high - low) * (limit - 1)).astype(np.int64)
    last = np.append(slices[1:] != slices[:-1], True)
    last[0] = True  # what can still be finished within the budget stays finishable
    return kept[last]
