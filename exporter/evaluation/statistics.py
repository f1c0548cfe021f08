"""How sure a difference between two models is that answered the same questions.

Questions about one image share its difficulty, so whole images are resampled, not questions (the cluster bootstrap;
Davison and Hinkley, "Bootstrap Methods and their Application", 3.8). McNemar's test belongs here too, once needed.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_CELLS = 1 << 22  # resampling counts held at once: 32 MB


@dataclass(frozen=True)
class PairedDifference:
    """The mean of `second - first`, in points, and the interval it lies in with 95 % confidence."""

    points: float
    low: float
    high: float
    samples: int
    clusters: int


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable], seed: int = 0
) -> PairedDifference:
    """Scores of 0 to 1, one a question, of two models; `clusters` is the image of each question.

    The interval is of percentiles. One cluster tells nothing about another: its interval is everything, -100 to 100.
    """
    difference = 100.0 * (np.asarray(second, float) - np.asarray(first, float))
    if not difference.size:
        raise ValueError("a difference of no samples; at least one is needed")
    numbers: dict[Hashable, int] = {}
    members = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    sums = np.bincount(members, difference)
    sizes = np.bincount(members)
    mean = float(difference.mean())
    if len(sizes) < 2:
        return PairedDifference(mean, -100.0, 100.0, difference.size, len(sizes))
    low, high = np.quantile(_resampled_means(sums, sizes, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return PairedDifference(mean, float(low), float(high), difference.size, len(sizes))


def _resampled_means(sums: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
    """sums, sizes (clusters,)  ->  means (RESAMPLES,), each over as many clusters drawn with replacement."""
    generator = np.random.default_rng(seed)
    count = len(sizes)
    even = np.full(count, 1 / count)
    means = []
    for start in range(0, RESAMPLES, step := max(1, _CELLS // count)):
        drawn = generator.multinomial(count, even, size=min(step, RESAMPLES - start))  # (resamples, clusters)
        means.append((drawn @ sums) / (drawn @ sizes))
    return np.concatenate(means)
