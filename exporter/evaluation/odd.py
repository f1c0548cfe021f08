"""Answers that tell of a broken model whatever their score: empty, the same to all questions, or going in circles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vlmq.exporter.evaluation.records import Record
from vlmq.exporter.evaluation.tasks.task import Task

ALMOST_EVERY = 0.9  # share of the questions that one answer may have before it is called so
ENOUGH = 10  # questions below which that says nothing
UNIT = 8  # words, at most, of a phrase that is said again and again
TIMES = 3
LONG_ANSWER = 5  # words on average from which a task of short answers asks for an instruction


@dataclass(frozen=True)
class Odd:
    """Counts over the answered samples. `common`: the most frequent answer, and how many have it."""

    answered: int
    failed: int
    empty: int
    unparsed: int
    circling: int
    common: str
    common_count: int
    references_agree: float  # the share that the most frequent first reference has: some sets have one answer for all
    words: float  # of an answer, on average

    @property
    def is_one_for_all(self) -> bool:
        """Whether (almost) every question got one answer, and that is not how the set is."""
        share = self.common_count / self.answered if self.answered else 0.0
        return self.answered >= ENOUGH and share >= ALMOST_EVERY and share > self.references_agree + 0.05


def odd(task: Task, records: Sequence[Record]) -> Odd:
    answered = [record for record in records if record.failed is None]
    read = [task.answer_of(record) for record in answered]
    texts = [record.answer or "" for record in answered]
    common, times = Counter(said if said is not None else "" for said in read).most_common(1)[0] if read else ("", 0)
    first = Counter(record.references[0] for record in answered if record.references)
    return Odd(
        answered=len(answered),
        failed=len(records) - len(answered),
        empty=sum(not text.strip() for text in texts),
        unparsed=sum(said is None for said in read),
        circling=sum(circles(text) for text in texts),
        common=common,
        common_count=times,
        references_agree=max(first.values(), default=0) / max(1, len(answered)),
        words=sum(len(text.split()) for text in texts) / max(1, len(texts)),
    )


def circles(text: str) -> bool:
    """Whether a phrase is said three times in a row and makes up at least half of the text: "a dog a dog a dog"."""
    words = text.lower().split()
    for unit in range(1, UNIT + 1):
        run = 0  # words in a row that equal the one `unit` before
        for place in range(unit, len(words)):
            run = run + 1 if words[place] == words[place - unit] else 0
            said = run + unit
            if said >= max(TIMES * unit, 4, len(words) / 2) and run:
                return True
    return False


def in_words(found: Odd, task: Task) -> list[str]:
    """A line for every count that is not zero, plainest first."""
    lines = []
    if found.failed:
        lines.append(f"{found.failed} samples failed and are not in the figures; the results file says why")
    if found.empty:
        lines.append(f"{found.empty} of {found.answered} answers are empty")
    if found.unparsed:
        lines.append(f"{found.unparsed} of {found.answered} answers name no choice (unparsed); they count as wrong")
    if found.circling:
        lines.append(f"{found.circling} of {found.answered} answers say one phrase again and again")
    if found.is_one_for_all:
        share = 100 * found.common_count / found.answered
        lines.append(f"the same answer, {found.common!r}, to {share:.0f} % of the questions")
    if task.metric == "accuracy" and task.instruction is None and found.words > LONG_ANSWER:
        lines.append(
            f"answers have {found.words:.0f} words on average; ask for short ones, such as with "
            "--instruction 'Answer the question using a single word or phrase.'"
        )
    return lines
