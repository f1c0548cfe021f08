"""What configurations are scored by: a task prepares its samples once, and asks any number of models about them."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.vqa import by_answer_type
from vlmq.exporter.samples import Sample
from vlmq.exporter.search.packed import Scorer


class Asked(Protocol):
    """Samples of a task, prepared for the models of one family."""

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        """Score by name, the one that matters most first; the same names for every model."""
        ...


def score(model: PreTrainedModel, samples: Asked) -> dict[str, float]:
    """The scores of a model on prepared samples."""
    return samples.score(model)


def ask(task: str, checkpoint: Checkpoint, model: PreTrainedModel, samples: Sequence[Sample]) -> Asked:
    """Prepare the samples of a task; `model` is the checkpoint as it is. VlmqError where it has no use for them."""
    return TASKS[task](checkpoint, model, fitting(task, samples))


def fitting(task: str, samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """The samples that a task asks about; VlmqError for an unknown task, and where there are none."""
    if task not in TASKS:
        raise VlmqError(f"--task {task}: unknown; choose {', '.join(TASKS)}")
    found = tuple(sample for sample in samples if sample.kind == "question" and sample.answers and sample.image)
    if not found:
        raise VlmqError(f"--task {task}: no sample is a question with an image and an answer; name others with --data")
    return found


class Vqa:
    """Accuracy in percent, of all questions and by answer type, and how far the first token's logits went.

    divergence: mean Kullback-Leibler divergence of each answer's first token from the reference's, in nats: what is
    left to see where accuracy does not move.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, samples: Sequence[Sample]) -> None:
        self.scorer = Scorer(checkpoint, samples, model)
        self.kinds = by_answer_type([sample.answer_type for sample in samples])
        self.reference = log_softmax(self.scorer.score(model).logits)

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        found = self.scorer.score(model)
        accuracy = {kind: 100 * float(found.right[places].mean()) for kind, places in self.kinds.items()}
        divergence = float(divergences(self.reference, log_softmax(found.logits)).mean())
        return {"accuracy": accuracy.pop("overall"), "divergence": divergence, **accuracy}


TASKS = {"vqa": Vqa}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n, vocabulary) -> the same in float64, normalised."""
    return torch.from_numpy(logits).double().log_softmax(-1).numpy()


def divergences(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) of each row, from log-probabilities: (n, vocabulary) twice  ->  (n,), nats."""
    return (np.exp(reference) * (reference - other)).sum(-1)
