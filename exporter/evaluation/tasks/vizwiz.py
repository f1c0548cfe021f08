"""VizWiz-VQA: Gurari et al., "VizWiz Grand Challenge"; files of vizwiz.org, VQAv2's formula.

    val.json (or Annotations/val.json), val/VizWiz_val_*.jpg

`unanswerable` is an answer like any other: a model earns it by saying so.
"""

from pydantic import BaseModel, RootModel

from vlmq.exporter.evaluation.tasks.place import Place
from vlmq.exporter.evaluation.tasks.questions import answered_row, normalised, vqa_scores
from vlmq.exporter.evaluation.tasks.task import Asked, Faults, Task
from vlmq.exporter.evaluation.vqa import ANSWER_TYPES
from vlmq.exporter.image_finder import ImageFinder
from vlmq.exporter.json_files import parse, read_text
from vlmq.exporter.samples import Sample

FILES = ("val.json", "train.json", "Annotations/val.json", "Annotations/train.json", "annotations/val.json")


class Answer(BaseModel):
    answer: str


class Question(BaseModel):
    image: str
    question: str
    answers: list[Answer] = []
    answer_type: str | None = None


class File(RootModel[list[Question]]):
    pass


def read(place: Place, faults: Faults) -> list[Asked]:
    file = place.file("VizWiz questions", FILES)
    find = ImageFinder(file, file.stem)
    return [
        Asked(
            Sample(
                id=question.image,  # one question an image
                image=find.by_name(question.image),
                kind="question",
                text=question.question,
                answers=tuple(answer.answer for answer in question.answers),
                answer_type=question.answer_type,
            ),
            (question.answer_type,) if question.answer_type else (),
        )
        for question in parse(read_text(file), File, file, "name a file of VizWiz-VQA annotations").root
    ]


TASK = Task(
    name="vizwiz",
    title="VizWiz",
    read=read,
    row=answered_row,
    score=vqa_scores,
    answer_of=normalised,
    order=(*ANSWER_TYPES, "unanswerable"),
)
