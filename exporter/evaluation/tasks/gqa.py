"""GQA: Hudson and Manning, "GQA: A New Dataset for Real-World Visual Reasoning"; files of the GQA web page.

    testdev_balanced_questions.json (or val_balanced_questions.json), images/*.jpg

An answer is right where it equals the annotated one after both are in lower case and without a full stop at the end.
"""

from collections.abc import Sequence

from pydantic import BaseModel, RootModel

from vlmq.exporter.evaluation.records import Record
from vlmq.exporter.evaluation.tasks.place import Place
from vlmq.exporter.evaluation.tasks.task import Asked, Faults, Row, Task
from vlmq.exporter.image_finder import ImageFinder
from vlmq.exporter.json_files import parse_keyed, read_text
from vlmq.exporter.samples import Sample

FILES = ("*_balanced_questions.json", "questions/*_balanced_questions.json")
KINDS = ("structural", "semantic")


class Question(BaseModel):
    question: str
    imageId: str  # noqa: N815    # the file's own name
    answer: str | None = None
    types: dict[str, str | None] = {}


class File(RootModel[dict[str, Question]]):
    pass


def read(place: Place, faults: Faults) -> list[Asked]:
    file = place.file("balanced GQA questions", FILES)
    content = parse_keyed(read_text(file), File, file, "name a file of GQA questions", faults)
    find = ImageFinder(file, "images")
    return [_asked(id_, question, find) for id_, question in content.root.items()]


def row(row: Row, id_: str) -> Asked:
    return _asked(str(row.get("id", id_)), Question.model_validate({"imageId": id_, **row}), None)


def _asked(id_: str, question: Question, find: ImageFinder | None) -> Asked:
    kinds = tuple(f"{kind}: {question.types[kind]}" for kind in KINDS if question.types.get(kind))
    answers = () if question.answer is None else (question.answer,)
    image = find.by_id(question.imageId) if find else None
    return Asked(Sample(f"question-{id_}", image, "question", question.question, answers), kinds)


def normal(answer: str) -> str:
    return " ".join(answer.lower().split()).rstrip(".").rstrip()


def answer_of(record: Record) -> str:
    return normal(record.answer or "")


def score(records: Sequence[Record]) -> list[float]:
    return [float(answer_of(record) == normal(record.references[0])) for record in records]


TASK = Task(name="gqa", title="GQA", read=read, row=row, score=score, answer_of=answer_of)
