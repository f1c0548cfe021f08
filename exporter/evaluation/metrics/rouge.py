"""ROUGE-L: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3; beta as in the COCO evaluation."""

from collections.abc import Sequence

BETA = 1.2  # recall weighs that much more than precision

Words = Sequence[str]


def rouge_l(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Score of every image's caption, 0 to 1; ROUGE-L is their mean. captions[i], references[i][j]: words.

    Precision and recall are each the best over the references.
    """
    return [_score(words, said) for words, said in zip(captions, references, strict=True)]


def _score(words: Words, references: Sequence[Words]) -> float:
    common = [_longest_common(words, other) for other in references]
    precision = max(common, default=0) / max(1, len(words))
    recall = max((length / max(1, len(other)) for length, other in zip(common, references, strict=True)), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(one: Words, other: Words) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        before = 0  # lengths[place - 1] of the row above
        for place, seen in enumerate(other, start=1):
            longest = before + 1 if word == seen else max(lengths[place], lengths[place - 1])
            before, lengths[place] = lengths[place], longest
    return lengths[-1]
