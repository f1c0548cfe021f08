"""What the benchmarks share: the machine in words, results as JSON, and answers of a model in this process."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.data import demo_folder
from vlmq.exporter.evaluation.answers import BATCH, answer_all, images_of
from vlmq.exporter.runtime import Answer, TorchVlm, open_processor
from vlmq.exporter.samples import Sample, prompt_of
from vlmq.exporter.sources import read

logging.disable_progress_bar()

SOME = 2000
RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime")


def machine() -> dict[str, object]:
    """Processor, cores, a GPU and library versions: what a figure depends on."""
    model = (
        next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "system": platform.system(),
        "python": platform.python_version(),
        "libraries": found,
    }


def revision() -> str:
    """The commit that is checked out; with a `+` where files of it were changed since."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=Path(__file__).parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip()


def write(name: str, command: str, results: object) -> Path:
    """Write benchmarks/results/NAME.json: the command that makes it, the machine, the results."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"command": command, "machine": machine(), "results": results}, indent=1) + "\n")
    return path


def questions() -> tuple[Sample, ...]:
    """The demo's evaluation questions: none of their pictures was calibrated or trained on."""
    return tuple(sample for sample in read(demo_folder("evaluation"), None).samples if sample.kind == "question")


def some_questions() -> tuple[Sample, ...]:
    """SOME of them, where many models are asked: all questions about 500 pictures."""
    return questions()[:SOME]


def calibration(count: int, seed: int) -> tuple[Sample, ...]:
    return read(demo_folder("calibration"), count, seed).samples


@cache
def processor_of(folder: Path) -> ProcessorMixin:
    return open_processor(folder)


def vlm(checkpoint: Checkpoint, model: PreTrainedModel) -> TorchVlm:
    return TorchVlm(model, processor_of(checkpoint.folder))


def answers(asked: TorchVlm, checkpoint: Checkpoint, samples: Sequence[Sample]) -> list[Answer]:
    return answer_all(asked, samples, checkpoint.family)


def first_logits(asked: TorchVlm, checkpoint: Checkpoint, samples: Sequence[Sample]) -> np.ndarray:
    """(n, vocabulary) float64: the logits of each answer's first token."""
    batches = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
    return np.concatenate(
        [
            asked.next_logits(images_of(batch), [prompt_of(sample, checkpoint.family) for sample in batch])
            for batch in batches
        ]
    ).astype(np.float64)


def divergence(reference: np.ndarray, logits: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence, in nats, of the softmax of `logits` from that of `reference`."""
    return float(divergences(reference, logits).mean())


def divergences(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """(n, vocabulary) twice  ->  (n,): the divergence of each row."""

    def log_softmax(values: np.ndarray) -> np.ndarray:
        shifted = values - values.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    first, second = log_softmax(reference), log_softmax(logits)
    return (np.exp(first) * (first - second)).sum(-1)
