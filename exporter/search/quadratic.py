"""One choice for every item where effects add up before they are squared: the least divergence within a budget.

With a[n, i, c] from `fisher.effects`, what choices c_i do is

    1/2 mean over n of (sum_i a[n, i, c_i])^2  =  sum_ij Q[i c_i, j c_j]

Without its terms i != j that is a knapsack, which gives the beginning (`knapsack.py`). From there the change of one
item, or of two at once, that lowers the whole most is made until none does.
"""

from collections.abc import Sequence

import numpy as np

from vlmq.exporter.search import knapsack

LEAST = 1e-9  # of the cost: what lowers it by less is not worth a step


def products(effects: np.ndarray) -> np.ndarray:
    """Q (items, choices, items, choices): half the mean products of effects (n, items, choices)."""
    count, *shape = effects.shape
    rows = effects.reshape(count, -1)
    return (0.5 / count * rows.T @ rows).reshape(*shape, *shape)


def loosened(costs: np.ndarray, share: float) -> np.ndarray:
    """Q of effects of which two items have only so much in common: the products of different items times `share`."""
    found, items = share * costs, np.arange(len(costs))
    found[items, :, items] = costs[items, :, items]
    return found


def cost(costs: np.ndarray, chosen: Sequence[int]) -> float:
    """What choices do, in nats: costs is Q above, chosen the place of each item's choice."""
    items, places = np.arange(len(costs)), list(chosen)
    return float(costs[items, places][:, items, places].sum())


def solve(costs: np.ndarray, sizes: np.ndarray, budget: int) -> tuple[int, ...]:
    """The place of each item's choice. costs: Q above; sizes (items, choices) int64 bytes.

    ValueError: nothing fits the budget.
    """
    apart = [knapsack.Choices(size, np.diagonal(costs[item, :, item])) for item, size in enumerate(sizes)]
    found = knapsack.solve(apart, budget)
    if found is None:
        raise ValueError(f"nothing fits {budget} bytes")
    chosen = np.array(found.chosen)
    while (step := _step(costs, sizes, budget, chosen)) is not None:
        for item, choice in step:
            chosen[item] = choice
    return tuple(chosen.tolist())


def _step(costs: np.ndarray, sizes: np.ndarray, budget: int, chosen: np.ndarray) -> Sequence[tuple[int, ...]] | None:
    """The items to change, one or two, and their choices: what lowers the cost most. None: nothing lowers it.

    With d the change of effects that a change of one item makes, and v the sum of all effects, the cost changes by
    2 d v + d d, and for two by the sum of theirs and 2 d d'.
    """
    items = np.arange(len(sizes))
    now = costs[items, chosen]  # (items, items, choices): with the chosen of each
    total = float(now[:, items, chosen].sum())
    toward = now.sum(0)  # (items, choices): every choice with the sum of the chosen
    own = now[items, items]  # (items, choices): every choice with the chosen one of its item
    square = np.einsum("icic->ic", costs)
    lower = 2 * (toward - toward[items, chosen][:, None]) + square - 2 * own + own[items, chosen][:, None]
    larger = sizes - sizes[items, chosen][:, None]
    room = budget - int(sizes[items, chosen].sum())
    alone = np.where(larger <= room, lower, np.inf)
    best, step = alone.min(), [_place(alone)]
    for item in items[:-1]:
        others = items[item + 1 :]
        moved = costs[item] - costs[item, chosen[item]]  # (choices, items, choices)
        crossed = moved[:, others] - moved[:, others, chosen[others]][:, :, None]
        both = lower[item][:, None, None] + lower[others] + 2 * crossed
        both = np.where(larger[item][:, None, None] + larger[others] <= room, both, np.inf)
        if both.min() < best:
            mine, other, theirs = _place(both)
            best, step = both.min(), [(item, mine), (others[other], theirs)]
    return None if best >= -LEAST * total else step


def _place(values: np.ndarray) -> tuple[int, ...]:
    """Of the least."""
    return tuple(map(int, np.unravel_index(values.argmin(), values.shape)))
