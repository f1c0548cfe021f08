"""Which pictures are for what: ranges of ids that cannot meet, and what a guesser scores who never looks."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache

from vlmq.exporter.demo.questions import Question, questions_about
from vlmq.exporter.demo.world import scene_of

CALIBRATION = range(1_000_000, 1_000_256)
ASKING = range(1_000_256, 1_001_280)  # for what needs more than a calibration does, as the allocation of bits
EVALUATION = range(2_000_000, 2_000_600)
VALIDATION = range(3_000_000, 3_010_000)  # to choose among checkpoints while training
TRAINING = range(10_000_000, 1_000_000_000)

SPLITS = {"calibration": CALIBRATION, "asking": ASKING, "evaluation": EVALUATION}
# Of each picture; the 2400 of the evaluation give a 95 % interval of 2 points.
QUESTIONS = {"calibration": 2, "asking": 2, "evaluation": 4}


def questions_of(split: str) -> dict[int, list[Question]]:
    """The questions of a split, by the id of their picture."""
    return {id: questions_about(scene_of(id), QUESTIONS[split]) for id in SPLITS[split]}


@cache
def _guesses(pictures: int) -> dict[str, str]:
    """Question text -> its most frequent answer over that many training pictures."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for id in TRAINING[:pictures]:
        for question in questions_about(scene_of(id), 4):
            answers[question.text][question.answer] += 1
    return {text: counted.most_common(1)[0][0] for text, counted in answers.items()}


def prior_accuracy(split: str, pictures: int = 30_000) -> float:
    """How often, in percent, the most frequent answer to the same question is right: the best without the image."""
    guesses = _guesses(pictures)
    asked = [question for questions in questions_of(split).values() for question in questions]
    right = [guesses.get(question.text) == question.answer for question in asked]
    return 100 * sum(right) / len(right)
