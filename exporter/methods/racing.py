"""A race: which of several candidates loses least over many rows, told from as few rows as decide it.

Rows are looked at slab by slab. After each, a candidate is left that is surely behind the best one so far, or ahead of
it by next to nothing: the differences are taken row by row, so what makes a row hard for all of them cancels out
(Hoeffding races, Maron and Moore, NIPS 1993, section 2, with the normal bound of a sample drawn without replacement).
"""

from collections.abc import Callable

import torch
from torch import Tensor

SURE = 3.0  # standard errors of a difference; where chance is larger than that, the two are much alike
CLOSE = 0.001  # of the best one's loss: who may be ahead by so much is not waited for


def race(candidates: int, slabs: int, rows: int, losses: Callable[[int, int], Tensor]) -> int:
    """The candidate with the least sum of losses over all rows, or one that is CLOSE to it; of equals the first.

    losses: of a candidate on the rows of a slab, (n,); a slab should hold rows of all kinds. rows: of all slabs.
    Where the race is not decided before its end, every row was looked at, and the answer is exact.
    """
    seen = {candidate: torch.empty(0, dtype=torch.float64) for candidate in range(candidates)}
    best = 0
    for slab in range(slabs):
        if len(seen) == 1:
            break
        for candidate, found in seen.items():
            seen[candidate] = torch.cat([found, losses(candidate, slab).double().cpu()])
        best = min(seen, key=lambda candidate: seen[candidate].sum().item())
        seen = {
            candidate: found
            for candidate, found in seen.items()
            if candidate == best or not _is_behind(found, seen[best], rows)
        }
    return best


def _is_behind(losses: Tensor, best: Tensor, rows: int) -> bool:
    """Whether losses (n,) would stay above the best's (n,), or CLOSE, on all rows, of which n were drawn."""
    difference = losses - best
    drawn = len(difference)
    if drawn < 2:
        return False
    error = (difference.var() * (1 - drawn / rows) / drawn).sqrt()
    return bool(difference.mean() + CLOSE * best.mean() > SURE * error)
