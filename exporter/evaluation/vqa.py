"""VQA accuracy: Antol et al., "VQA: Visual Question Answering", section 3, and the evaluation page of visualqa.org.

An answer counts min(1, matches / 3), where matches are the annotators who gave it, averaged over leaving out each
annotator in turn. Answers of the model and of the annotators are normalised alike before they are compared. (The
released script leaves both as they are where all ten annotators agree, so that "Red" is wrong for ten "red"; the
page does not say so, and we do not.)
"""

import re
from collections.abc import Sequence
from functools import lru_cache

ANNOTATORS = 10
ANSWER_TYPES = ("yes/no", "number", "other")

# The released contractions; an answer that lacks any one of a contraction's apostrophes is given it back.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})
MARKS = ';/[]"{}()=+\\_-><@`,?!'

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # a decimal point stays


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_REPAIRS = {broken: word for word in CONTRACTIONS.split() for broken in _without_one_apostrophe(word)}


@lru_cache(1 << 16)  # a sweep compares with the same annotated answers again and again
def normalise(answer: str) -> str:
    """The answer as it is compared: lower case, digits for number words, no articles and no punctuation."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    words = _without_punctuation(text).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(_REPAIRS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark between two words becomes a space; one at the edge of a word, or in a text with 1,000, goes."""
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    bare = text
    for mark in MARKS:
        at_an_edge = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if at_an_edge or in_number else " ")
    return _PERIOD.sub("", bare)


def accuracy(answer: str, annotated: Sequence[str]) -> float:
    """0 to 1: leave-one-out over ten annotators; with fewer answers than ten, whether it is among them."""
    said = normalise(answer)
    matches = [normalise(other) == said for other in annotated]
    if len(annotated) < ANNOTATORS:
        return float(any(matches))
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def by_answer_type(answer_types: Sequence[str | None]) -> dict[str, list[int]]:
    """Positions of the questions of each answer type: `overall` first, then as VQAv2's table has them."""
    present = {kind for kind in answer_types if kind}
    order = [kind for kind in ANSWER_TYPES if kind in present] + sorted(present.difference(ANSWER_TYPES))
    typed = {kind: [place for place, other in enumerate(answer_types) if other == kind] for kind in order}
    return {"overall": list(range(len(answer_types))), **typed}
