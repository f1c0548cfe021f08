"""VQAv2: Goyal et al., "Making the V in VQA Matter"; files and formula of visualqa.org.

v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/COCO_val2014_*.jpg
"""

from vlmq.exporter.coco import read_questions
from vlmq.exporter.evaluation.tasks.place import Place
from vlmq.exporter.evaluation.tasks.questions import answered_row, normalised, vqa_scores
from vlmq.exporter.evaluation.tasks.task import Asked, Faults, Task
from vlmq.exporter.evaluation.vqa import ANSWER_TYPES
from vlmq.exporter.sources import ANNOTATIONS, QUESTIONS


def read(place: Place, faults: Faults) -> list[Asked]:
    questions = place.file("VQAv2 questions", QUESTIONS)
    annotations = place.beside(questions, "VQAv2 annotations", ANNOTATIONS)
    return [
        Asked(sample, (sample.answer_type,) if sample.answer_type else ())
        for sample in read_questions(questions, annotations, faults)
    ]


TASK = Task(
    name="vqav2",
    title="VQAv2",
    read=read,
    row=answered_row,
    score=vqa_scores,
    answer_of=normalised,
    order=ANSWER_TYPES,
)
