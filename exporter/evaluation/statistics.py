"""How sure a difference between two models is that answered the same questions.

Questions about one image share its difficulty, so whole images are resampled, not questions (the cluster bootstrap;
Davison and Hinkley, "Bootstrap Methods and their Application", 3.8). McNemar's test is there beside it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
HALF = 0.5  # the score above which an answer is right
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


@dataclass(frozen=True)
class McNemar:
    """Of the samples that one model got right and the other wrong: how many each got, and the exact test's p."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """McNemar's exact test on paired scores of 0 to 1: is it as likely that only the first is right as only the second?

    A score above one half is right; by VQAv2's formula, an answer that two of ten annotators gave. The test takes
    samples for independent, which questions about one image are not; the interval of `paired_difference` does not.
    McNemar, "Note on the sampling error of the difference between correlated proportions"; exact as in Fagerland et
    al., "The McNemar test for binary matched-pairs data", section 2.
    """
    from scipy.stats import binomtest

    pairs = [(one > HALF, other > HALF) for one, other in zip(first, second, strict=True)]
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    differing = only_first + only_second
    p = float(binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0
    return McNemar(only_first, only_second, p)


def in_words(difference: PairedDifference) -> str:
    """What the interval says: no difference at all, one within noise, or one beyond it."""
    if difference.low == difference.high == 0.0:
        return "no difference"
    if difference.clusters < 2:
        return "one image: nothing can be said"
    if difference.low <= 0.0 <= difference.high:
        return "within noise"
    return f"{'better' if difference.points > 0 else 'worse'}, beyond noise"
