"""Verification without processes of its own, for tests that verify many exports: a second each instead of ten."""

from collections.abc import Sequence
from pathlib import Path

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import worker
from vlmq.exporter.evaluation.measure import Measurement, Request
from vlmq.exporter.load import load
from vlmq.exporter.runtime import Engine, OnnxVlm, TorchVlm, open_processor
from vlmq.exporter.samples import Sample


def measure_here(
    folder: Path,
    engine: Engine,
    samples: Sequence[Sample],
    keep: Path | None = None,
    *,
    answer: bool = True,
    forced: list[list[int]] | None = None,
    **_: object,
) -> Measurement:
    """What `measure` finds, all samples of which are about different images; nothing is timed."""
    request = Request(str(folder), engine, list(samples) if answer else [], [], list(samples), forced)
    try:
        return worker.work(request)
    except Exception as error:  # where a worker would end
        raise VlmqError(f"{folder}: {error}") from error


def open_on_one_thread(folder: Path, engine: Engine) -> OnnxVlm | TorchVlm:
    return OnnxVlm(folder, threads=1) if engine == "onnx" else TorchVlm(load(folder), open_processor(folder))
