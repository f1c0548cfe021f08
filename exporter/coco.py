"""VQAv2 questions and COCO captions, as their official files have them (visualqa.org/download, cocodataset.org).

Images are looked for in the file's own folder and beside it, in `images/` and in folders named as the splits are.
"""

from pathlib import Path

from pydantic import BaseModel

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.images import is_image
from vlmq.exporter.json_files import parse, read_text
from vlmq.exporter.samples import Sample

SPLITS = ("val2014", "train2014", "val2017", "train2017", "test2015")
Id = int | str


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


def read_questions(questions: Path, annotations: Path | None) -> list[Sample]:
    """VQAv2's two files; without annotations the samples have no answers, which is enough to calibrate."""
    asked = parse(read_text(questions), QuestionFile, questions, "name a file of VQAv2 questions or of COCO captions")
    notes: dict[Id, Annotation] = {}
    if annotations:
        content = parse(read_text(annotations), AnnotationFile, annotations, "put VQAv2's annotations there")
        notes = {note.question_id: note for note in content.annotations}
    orphans = notes.keys() - {question.question_id for question in asked.questions}
    if orphans:
        raise VlmqError(
            f"{annotations}: answers to question {min(map(str, orphans))}, not in {questions.name}; "
            "use the two files of one split"
        )
    find = _Finder(questions, asked.data_subtype)
    return [_question(question, notes.get(question.question_id), find) for question in asked.questions]


def _question(question: Question, note: Annotation | None, find: "_Finder") -> Sample:
    return Sample(
        id=f"question-{question.question_id}",
        image=find.by_id(question.image_id),
        kind="question",
        text=question.question,
        answers=tuple(answer.answer for answer in note.answers) if note else (),
        answer_type=note.answer_type if note else None,
    )


def read_captions(captions: Path) -> list[Sample]:
    """A COCO captions file: one request an image, with all of its captions as answers."""
    content = parse(read_text(captions), CaptionFile, captions, "name a file of VQAv2 questions or of COCO captions")
    said: dict[Id, list[str]] = {image.id: [] for image in content.images}
    for note in content.annotations:
        if note.image_id not in said:
            raise VlmqError(f"{captions}: a caption of image {note.image_id}, not among its images; repair the file")
        said[note.image_id].append(note.caption)
    find = _Finder(captions, "")
    return [
        Sample(f"caption-{image.id}", find.by_name(image.file_name), "caption", answers=tuple(said[image.id]))
        for image in content.images
    ]


class _Finder:
    """Finds images by the names that the official sets have for them, with one listing of each likely folder."""

    def __init__(self, file: Path, subtype: str) -> None:
        self.home = file.parent / "images"
        named = ["images", *([subtype] if subtype else SPLITS)]
        folders = [file.parent, *(near / name for near in (file.parent, file.parent.parent) for name in named)]
        self.names: dict[str, Path] = {}
        for folder in filter(Path.is_dir, folders):
            for path in filter(is_image, folder.iterdir()):
                self.names.setdefault(path.name, path)
        self.ids: dict[str, Path] = {}
        for name, path in sorted(self.names.items()):
            # COCO_val2014_000000000042.jpg, 000000000042.jpg and 42.png are all image 42.
            self.ids.setdefault(_bare(Path(name).stem.rsplit("_", 1)[-1]), path)

    def by_name(self, name: str) -> Path:
        return self.names.get(Path(name).name, self.home / name)

    def by_id(self, id_: Id) -> Path:
        """Where nothing is found, the path the image might have, for the message that it is missing."""
        return self.ids.get(_bare(str(id_)), self.home / str(id_))


def _bare(id_: str) -> str:
    return id_.lstrip("0") or "0"
