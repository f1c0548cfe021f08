"""What configurations are scored by: a task prepares its samples once, and asks any number of models about them.

Answers are scored as `vlmq evaluate` scores them; a task here adds how its answers are told from the reference's where
their score does not move.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.questionnaire import gather
from vlmq.exporter.evaluation.records import Record
from vlmq.exporter.evaluation.tasks import captions, gqa, scienceqa, vizwiz, vqav2
from vlmq.exporter.evaluation.tasks import task as evaluation
from vlmq.exporter.samples import Sample
from vlmq.exporter.search.packed import Scorer


@dataclass(frozen=True)
class Task:
    """A task of `vlmq evaluate`, and the kind of its samples.

    tell_all: whether every token of an answer tells something, as those of captions do, which all begin alike; else
    the first alone. official: read from the benchmark's own files, which then have to be named.
    """

    evaluated: evaluation.Task
    kind: Literal["question", "caption"]
    asks: str  # of its samples, in words
    tell_all: bool = False
    official: bool = False


_QUESTION = "a question with an image and an answer"
TASKS = {
    "vqa": Task(vqav2.TASK, "question", _QUESTION),
    "captions": Task(captions.COCO, "caption", "a caption request with an image and reference captions", tell_all=True),
    "gqa": Task(gqa.TASK, "question", _QUESTION, official=True),
    "vizwiz": Task(vizwiz.TASK, "question", _QUESTION, official=True),
    "scienceqa": Task(scienceqa.TASK, "question", _QUESTION, official=True),
}


class Asked(Protocol):
    """Samples of a task, prepared for the models of one family."""

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        """Score by name, the one that matters most first; the same names for every model."""
        ...


def task_of(name: str) -> Task:
    if name not in TASKS:
        raise VlmqError(f"--task {name}: unknown; choose {', '.join(TASKS)}")
    return TASKS[name]


def ask(name: str, checkpoint: Checkpoint, model: PreTrainedModel, asked: Sequence[evaluation.Asked]) -> Asked:
    """Prepare the samples of a task; `model` is the checkpoint as it is."""
    return Answers(task_of(name), checkpoint, model, asked)


def score(model: PreTrainedModel, samples: Asked) -> dict[str, float]:
    """The scores of a model on prepared samples."""
    return samples.score(model)


def fitting(name: str, samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """The samples that a task asks about; VlmqError for an unknown task, and where there are none."""
    task = task_of(name)
    found = tuple(sample for sample in samples if sample.kind == task.kind and sample.answers and sample.image)
    if not found:
        raise VlmqError(f"--task {name}: no sample is {task.asks}; name others with --data")
    return found


def asked_of(name: str, samples: Iterable[Sample]) -> tuple[evaluation.Asked, ...]:
    """The same, each with the group that it counts in."""
    return tuple(
        evaluation.Asked(sample, (sample.answer_type,) if sample.answer_type else ())
        for sample in fitting(name, samples)
    )


def official(name: str, data: str | None) -> tuple[evaluation.Asked, ...]:
    """All samples with an image from the benchmark's own files; VlmqError where they are not named, or unreadable."""
    if data is None:
        raise VlmqError(f"--task {name}: reads the files of its own benchmark; name their folder with --data")
    return gather(task_of(name).evaluated, data, with_image=True).asked


class Answers:
    """Scores of answers, of all and by group, and how far their logits went.

    divergence: mean Kullback-Leibler divergence from the reference in nats: of each answer's first token or, where all
    tell, of every token of the first annotated answer, each after the annotated ones before it. What is left to see
    where scores do not move.
    """

    def __init__(
        self, task: Task, checkpoint: Checkpoint, model: PreTrainedModel, asked: Sequence[evaluation.Asked]
    ) -> None:
        self.task, self.asked = task.evaluated, asked
        samples = [one.sample for one in asked]
        self.scorer = Scorer(checkpoint, samples, model, self.task.max_new_tokens, task.tell_all)
        self.groups = _groups(asked, self.task.order)
        self.reference = log_softmax(self.scorer.score(model).logits)

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        found = self.scorer.score(model)
        records = [
            Record(id=one.sample.id, references=one.sample.answers, choices=one.choices, answer=text)
            for one, text in zip(self.asked, found.texts, strict=True)
        ]
        each = np.array(self.task.score(records))
        told = divergences(self.reference, log_softmax(found.logits))
        starts = found.told.cumsum() - found.told
        divergence = float((np.add.reduceat(told, starts) / found.told).mean())
        scores = {name: self.task.scale * float(each[places].mean()) for name, places in self.groups.items()}
        return {self.task.metric: self.task.scale * float(each.mean()), "divergence": divergence, **scores}


def _groups(asked: Sequence[evaluation.Asked], order: Sequence[str]) -> dict[str, list[int]]:
    """Positions of the samples of each group, in the order of the benchmark's table; others follow by name."""
    present = {group for one in asked for group in one.groups}
    ordered = [group for group in order if group in present] + sorted(present.difference(order))
    return {group: [place for place, one in enumerate(asked) if group in one.groups] for group in ordered}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n, vocabulary) -> the same in float64, normalised."""
    return torch.from_numpy(logits).double().log_softmax(-1).numpy()


def divergences(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) of each row, from log-probabilities: (n, vocabulary) twice  ->  (n,), nats."""
    return (np.exp(reference) * (reference - other)).sum(-1)
