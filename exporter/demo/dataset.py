"""Write a split of the world as people have real ones: VQAv2 questions and annotations, COCO captions, PNG pictures.

The layout of the first two is read by the official `vqa.py` (https://visualqa.org/download), that of captions by
`pycocotools`.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from vlmq.exporter.demo.questions import Question, captions_of
from vlmq.exporter.demo.splits import SPLITS, questions_of
from vlmq.exporter.demo.world import picture_of, scene_of

ANNOTATORS = 10  # VQAv2 asks as many people; here they agree


def write_split(split: str, folder: Path) -> Path:
    """Write one of SPLITS into a folder, the same bytes each time, and return the folder.

    images/{id}.png     64 x 64 RGB
    questions.json      {"questions": [{image_id, question, question_id}]}
    annotations.json    {"annotations": [{image_id, question_id, question_type, answer_type, multiple_choice_answer,
                        answers: [{answer, answer_confidence, answer_id} x 10]}]}
    captions.json       {"images": [{id, file_name}], "annotations": [{id, image_id, caption}]}
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for id in SPLITS[split]:
        Image.fromarray(picture_of(scene_of(id))).save(images / f"{id}.png")
    asked = [
        (image, 1000 * image + number, question)
        for image, questions in questions_of(split).items()
        for number, question in enumerate(questions)
    ]
    _write(
        folder / "questions.json",
        _header(split)
        | {
            "task_type": "Open-Ended",
            "questions": [
                {"image_id": image, "question": question.text, "question_id": id} for image, id, question in asked
            ],
        },
    )
    _write(
        folder / "annotations.json",
        _header(split)
        | {
            "annotations": [_annotation(image, id, question) for image, id, question in asked],
        },
    )
    _write(
        folder / "captions.json",
        _header(split)
        | {
            "images": [{"id": id, "file_name": f"{id}.png", "width": 64, "height": 64} for id in SPLITS[split]],
            "annotations": [
                {"id": 10 * id + number, "image_id": id, "caption": caption}
                for id in SPLITS[split]
                for number, caption in enumerate(captions_of(scene_of(id)))
            ],
        },
    )
    return folder


def _annotation(image: int, id: int, question: Question) -> dict:
    answers = [
        {"answer": question.answer, "answer_confidence": "yes", "answer_id": annotator}
        for annotator in range(1, ANNOTATORS + 1)
    ]
    return {
        "image_id": image,
        "question_id": id,
        "question_type": question.kind,
        "answer_type": question.answer_type,
        "multiple_choice_answer": question.answer,
        "answers": answers,
    }


def _header(split: str) -> dict:
    return {"info": {"description": "vlmq's demo world", "version": "1.0"}, "license": {}, "data_subtype": split}


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
