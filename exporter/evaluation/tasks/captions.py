"""Captions of COCO and Flickr30k: as Karpathy split them (cs.stanford.edu/people/karpathy/deepimagesent), or in COCO's
own annotation files.

    dataset_coco.json, val2014/COCO_val2014_*.jpg          dataset_flickr30k.json, flickr30k-images/*.jpg
    captions_val2014.json, val2014/COCO_val2014_*.jpg

CIDEr, BLEU and ROUGE-L need nothing else; METEOR and SPICE need Java (`metrics/java.py`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, field_validator

from vlmq.exporter.coco import read_captions
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.metrics import java
from vlmq.exporter.evaluation.metrics.bleu import bleu
from vlmq.exporter.evaluation.metrics.cider import cider
from vlmq.exporter.evaluation.metrics.ptb import tokens
from vlmq.exporter.evaluation.metrics.rouge import rouge_l
from vlmq.exporter.evaluation.records import Record
from vlmq.exporter.evaluation.tasks.place import Place
from vlmq.exporter.evaluation.tasks.task import Asked, Faults, Metric, Row, Task
from vlmq.exporter.image_finder import ImageFinder
from vlmq.exporter.json_files import parse, read_text
from vlmq.exporter.samples import Sample
from vlmq.exporter.sources import CAPTIONS

SPLIT = "test"  # of Karpathy's; its others are train, restval and val


class Sentence(BaseModel):
    raw: str


class Image(BaseModel):
    filename: str
    split: str
    sentences: list[Sentence]
    cocoid: int | None = None


class Karpathy(BaseModel):
    images: list[Image]


def reader(name: str) -> Callable[[Place, Faults], list[Asked]]:
    """Reads `dataset_NAME.json`, or COCO's own annotations."""

    def read(place: Place, faults: Faults) -> list[Asked]:
        file = place.file("captions", (f"dataset_{name}.json", *CAPTIONS))
        if file.match("dataset_*.json"):
            return read_karpathy(file, place.split or SPLIT)
        return [Asked(sample) for sample in read_captions(file, faults)]

    return read


def read_karpathy(file: Path, split: str) -> list[Asked]:
    images = parse(read_text(file), Karpathy, file, "name Karpathy's dataset_NAME.json").images
    chosen = [image for image in images if image.split == split]
    if not chosen:
        splits = ", ".join(sorted({image.split for image in images}))
        raise VlmqError(f"{file}: no images of split {split}; choose --split from {splits}")
    find = ImageFinder(file, "")
    return [
        Asked(
            Sample(
                id=f"caption-{Path(image.filename).stem if image.cocoid is None else image.cocoid}",
                image=find.by_name(image.filename),
                kind="caption",
                answers=tuple(sentence.raw for sentence in image.sentences),
            )
        )
        for image in chosen
    ]


class CaptionedRow(BaseModel):
    """A row in `datasets`: captions under `caption`, `captions` or, as lmms-lab has COCO's, `answer`."""

    caption: list[str] | None = None
    captions: list[str] | None = None
    answer: list[str] | None = None

    @field_validator("caption", "captions", "answer", mode="before")
    @classmethod
    def several(cls, said: Any) -> Any:
        return [said] if isinstance(said, str) else said


def row(row: Row, id_: str) -> Asked:
    found = CaptionedRow.model_validate(dict(row))
    said = found.caption or found.captions or found.answer or []
    return Asked(Sample(f"caption-{id_}", None, "caption", answers=tuple(said)))


def _words(records: Sequence[Record]) -> tuple[list[list[str]], list[list[list[str]]]]:
    said = [tokens(record.answer or "") for record in records]
    return said, [[tokens(reference) for reference in record.references] for record in records]


def score(records: Sequence[Record]) -> list[float]:
    """CIDEr of every caption; their mean is the set's."""
    return cider(*_words(records))


def more(records: Sequence[Record]) -> list[Metric]:
    words = _words(records)
    found = [Metric(f"BLEU-{order}", value) for order, value in enumerate(bleu(*words), start=1)]
    ranked = rouge_l(*words)
    found.append(Metric("ROUGE-L", sum(ranked) / len(ranked)))
    for name in java.SCORERS:
        try:
            found.append(Metric(name, java.score(name, *words)))
        except java.UnavailableError as reason:
            found.append(Metric(name, None, f"not available: {reason}"))
    return found


def normal(record: Record) -> str:
    return " ".join(tokens(record.answer or ""))


def _task(name: str, title: str) -> Task:
    return Task(
        name=name,
        title=title,
        read=reader(name),
        row=row,
        score=score,
        answer_of=normal,
        metric="CIDEr",
        scale=1.0,
        more=more,
        max_new_tokens=30,
    )


COCO = _task("coco", "COCO captions")
FLICKR30K = _task("flickr30k", "Flickr30k captions")
