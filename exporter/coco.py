"""VQAv2 questions and COCO captions, as their official files have them (visualqa.org/download, cocodataset.org).

Images are looked for as `image_finder.py` says.
"""

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.image_finder import ImageFinder
from vlmq.exporter.json_files import parse, read_text
from vlmq.exporter.samples import Sample

Id = int | str


def refuse(id_: str, line: str) -> None:
    """What becomes of a fault unless the caller counts it: VlmqError."""
    raise VlmqError(line)


class Question(BaseModel):
    question_id: Id
    image_id: Id
    question: str


class QuestionFile(BaseModel):
    data_subtype: str = ""
    questions: list[Question]


class AnnotatedAnswer(BaseModel):
    answer: str


class Annotation(BaseModel):
    question_id: Id
    answer_type: str | None = None
    answers: list[AnnotatedAnswer]


class AnnotationFile(BaseModel):
    annotations: list[Annotation]


class CaptionedImage(BaseModel):
    id: Id
    file_name: str


class Caption(BaseModel):
    image_id: Id
    caption: str


class CaptionFile(BaseModel):
    images: list[CaptionedImage]
    annotations: list[Caption]


def read_questions(
    questions: Path, annotations: Path | None, fault: Callable[[str, str], None] = refuse
) -> list[Sample]:
    """VQAv2's two files; without annotations the samples have no answers, which is enough to calibrate.

    fault: gets the id and a line for answers that belong to no question, or to one that has some already.
    """
    asked = parse(read_text(questions), QuestionFile, questions, "name a file of VQAv2 questions or of COCO captions")
    notes: dict[Id, Annotation] = {}
    if annotations:
        content = parse(read_text(annotations), AnnotationFile, annotations, "put VQAv2's annotations there")
        for note in content.annotations:
            if note.question_id in notes:
                id_ = f"question-{note.question_id}"
                fault(f"{id_}#2", f"{annotations}: answers to {id_} occur more than once; keep one of them")
            notes.setdefault(note.question_id, note)
    orphans = notes.keys() - {question.question_id for question in asked.questions}
    for orphan in sorted(map(str, orphans)):
        fault(
            f"question-{orphan}",
            f"{annotations}: answers to question {orphan}, not in {questions.name}; use the two files of one split",
        )
    find = ImageFinder(questions, asked.data_subtype)
    return [_question(question, notes.get(question.question_id), find) for question in asked.questions]


def _question(question: Question, note: Annotation | None, find: "ImageFinder") -> Sample:
    return Sample(
        id=f"question-{question.question_id}",
        image=find.by_id(question.image_id),
        kind="question",
        text=question.question,
        answers=tuple(answer.answer for answer in note.answers) if note else (),
        answer_type=note.answer_type if note else None,
    )


def read_captions(captions: Path, fault: Callable[[str, str], None] = refuse) -> list[Sample]:
    """A COCO captions file: one request an image, with all of its captions as answers.

    fault: gets the id and a line for captions that belong to no image.
    """
    content = parse(read_text(captions), CaptionFile, captions, "name a file of VQAv2 questions or of COCO captions")
    said: dict[Id, list[str]] = {image.id: [] for image in content.images}
    for note in content.annotations:
        if note.image_id not in said:
            line = f"{captions}: a caption of image {note.image_id}, not among its images; repair the file"
            fault(f"caption-{note.image_id}", line)
            continue
        said[note.image_id].append(note.caption)
    find = ImageFinder(captions, "")
    return [
        Sample(f"caption-{image.id}", find.by_name(image.file_name), "caption", answers=tuple(said[image.id]))
        for image in content.images
    ]
