"""BLEU of a whole set: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", section 2.

As the COCO evaluation has it: BLEU-1 to BLEU-4, the closest reference's length in the brevity penalty, and tiny terms
that keep a set without matches from dividing by zero.
"""

import math
from collections import Counter
from collections.abc import Sequence

ORDERS = 4
_TINY, _SMALL = 1e-15, 1e-9  # the script's

Words = Sequence[str]


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4, each 0 to 1. captions[i], references[i][j]: words."""
    matched, guessed = [0] * ORDERS, [0] * ORDERS
    length, closest = 0, 0
    for words, said in zip(captions, references, strict=True):
        length += len(words)
        closest += min((abs(len(other) - len(words)), len(other)) for other in said)[1]
        for order in range(1, ORDERS + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for other in said:
                most |= _counts(other, order)
            guessed[order - 1] += max(0, len(words) - order + 1)
            matched[order - 1] += (_counts(words, order) & most).total()
    ratio = (length + _TINY) / (closest + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if 0 < ratio < 1 else 1.0
    product, scores = 1.0, []
    for order in range(ORDERS):
        product *= (matched[order] + _TINY) / (guessed[order] + _SMALL)
        scores.append(brevity * product ** (1 / (order + 1)))
    return scores


def _counts(words: Words, order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
