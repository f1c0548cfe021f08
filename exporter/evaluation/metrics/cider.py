"""CIDEr-D: Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", section 3 and appendix.

Words are weighted by how rare they are among the images' references (TF-IDF, n-grams of 1 to 4); a caption scores by
the mean cosine to each reference, clipped so that repeating a word pays nothing, and falling with the difference in
length. As in the released script, length is counted in bigrams, and the mean is multiplied by 10.
"""

import math
from collections import Counter
from collections.abc import Sequence

ORDERS = 4
SIGMA = 6.0  # bigrams by which lengths may differ before it costs much

Words = Sequence[str]
_Vectors = list[dict[tuple[str, ...], float]]


def cider(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Score of every image's caption, 0 to 10, against its references; CIDEr is their mean.

    captions[i], references[i][j]: words. The rarity of a word is that among all `references`, so an image's score
    depends on which images it is scored with.
    """
    counted = [[_counts(words) for words in said] for said in references]
    frequency = Counter(gram for said in counted for gram in set().union(*said))
    total = math.log(len(references)) if references else 0.0

    def weigh(counts: Counter[tuple[str, ...]]) -> tuple[_Vectors, list[float], int]:
        vectors: _Vectors = [{} for _ in range(ORDERS)]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * (total - math.log(max(1, frequency[gram])))
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in vectors]
        return vectors, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    scores = []
    for words, said in zip(captions, counted, strict=True):
        hypothesis = weigh(_counts(words))
        alike = [_similarity(hypothesis, weigh(reference)) for reference in said]
        scores.append(10.0 * sum(alike) / len(alike))
    return scores


def _counts(words: Words) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[start : start + order]) for order in range(1, ORDERS + 1) for start in range(len(words) - order + 1)
    )


def _similarity(hypothesis: tuple[_Vectors, list[float], int], reference: tuple[_Vectors, list[float], int]) -> float:
    penalty = math.exp(-((hypothesis[2] - reference[2]) ** 2) / (2 * SIGMA**2))
    alike = 0.0
    for said, known, size, other in zip(hypothesis[0], reference[0], hypothesis[1], reference[1], strict=True):
        product = sum(min(value, known[gram]) * known[gram] for gram, value in said.items() if gram in known)
        alike += product / (size * other) if size and other else product
    return penalty * alike / ORDERS
