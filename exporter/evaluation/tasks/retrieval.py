"""Image-text retrieval on Karpathy's test splits: R@1, R@5 and R@10, images for texts and texts for images.

Files as in `captions.py`. The model is a `Blip2ForImageTextRetrieval`; `retrieve.py` runs it.
"""

from collections.abc import Sequence

from vlmq.exporter.evaluation.records import Record
from vlmq.exporter.evaluation.tasks.captions import reader, row
from vlmq.exporter.evaluation.tasks.task import Asked, Metric, Task

IMAGE_TO_TEXT, TEXT_TO_IMAGE = "image to text", "text to image"
DEPTHS = (1, 5, 10)


def ids_of(one: Asked) -> list[str]:
    """Of what looks for something: the image, and each of its captions."""
    return [one.sample.id, *(f"{one.sample.id}:{number}" for number in range(len(one.sample.answers)))]


def recall(records: Sequence[Record], depth: int) -> list[float]:
    """Whether what is looked for is among the first `depth`."""
    return [float(record.rank is not None and record.rank < depth) for record in records]


def score(records: Sequence[Record]) -> list[float]:
    return recall(records, 1)


def more(records: Sequence[Record]) -> list[Metric]:
    found = []
    for direction in (IMAGE_TO_TEXT, TEXT_TO_IMAGE):
        members = [record for record in records if direction in record.groups]
        for depth in DEPTHS[1:]:
            hits = recall(members, depth)
            found.append(Metric(f"R@{depth}, {direction}", 100 * sum(hits) / max(1, len(hits)), is_share=True))
    return found


def _task(name: str, title: str) -> Task:
    return Task(
        name=f"{name}-retrieval",
        title=f"{title} retrieval",
        read=reader(name),
        row=row,
        score=score,
        answer_of=lambda record: record.answer,
        metric="R@1",
        order=(IMAGE_TO_TEXT, TEXT_TO_IMAGE),
        more=more,
        retrieves=True,
    )


FLICKR30K = _task("flickr30k", "Flickr30k")
COCO = _task("coco", "COCO")
