"""What tasks of short answers share: the scores of VQAv2 and of an exact match."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, field_validator

from vlmq.exporter.evaluation import vqa
from vlmq.exporter.evaluation.records import Record
from vlmq.exporter.evaluation.tasks.task import Asked
from vlmq.exporter.samples import Sample


def vqa_scores(records: Sequence[Record]) -> list[float]:
    """VQAv2's formula; see `vqa.py`."""
    return [vqa.accuracy(record.answer or "", record.references) for record in records]


def normalised(record: Record) -> str:
    """The answer as VQAv2 compares it."""
    return vqa.normalise(record.answer or "")


class AnsweredRow(BaseModel):
    """A row of VQAv2 or VizWiz in `datasets`: answers are texts, or dictionaries with `answer`."""

    question: str
    answers: list[str]
    question_id: int | str | None = None
    answer_type: str | None = None
    category: str | None = None  # VizWiz's answer type, as lmms-lab has it

    @field_validator("answers", mode="before")
    @classmethod
    def only_the_text(cls, answers: Any) -> Any:
        if not isinstance(answers, list):
            return answers
        return [answer["answer"] if isinstance(answer, dict) and "answer" in answer else answer for answer in answers]


def answered_row(row: Any, id_: str) -> Asked:
    found = AnsweredRow.model_validate(dict(row))
    kind = found.answer_type or found.category
    name = id_ if found.question_id is None else f"question-{found.question_id}"
    sample = Sample(name, None, "question", found.question, tuple(found.answers), kind)
    return Asked(sample, (kind,) if kind else ())
