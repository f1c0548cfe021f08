"""The process that measures one model: `python -m vlmq.exporter.evaluation.worker WORK`, started by `measure.py`.

Reads WORK/request.json; says `DONE OF` on its standard output as it answers; writes WORK/found.json and
WORK/outputs.npz, or WORK/refusal with one line for a person.
"""

import contextlib
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnxruntime  # noqa: F401 - before the first measurement, for both engines alike
import torch
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoProcessor, PretrainedConfig

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.answers import answer_all, images_of
from vlmq.exporter.evaluation.components import outputs_of
from vlmq.exporter.evaluation.measure import Engine, Request
from vlmq.exporter.evaluation.memory import forget_peak, peak, resident
from vlmq.exporter.families import family_of
from vlmq.exporter.load import load
from vlmq.exporter.runtime import OnnxVlm, TorchVlm
from vlmq.exporter.samples import prompt_of
from vlmq.formats.errors import FormatError


def import_everything(folder: Path, config: PretrainedConfig) -> None:
    """transformers imports a model's and a processor's code at their first use: that is not memory of the model."""
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    AutoProcessor.from_pretrained(folder)
    gc.collect()


def open_vlm(folder: Path, engine: Engine) -> Any:
    """The model of the folder in the engine."""
    if engine == "onnx":
        return OnnxVlm(folder)
    model = load(folder)
    return TorchVlm(model, AutoProcessor.from_pretrained(folder), family_of(model.config))


def work(request: Request, here: Path, said: TextIO) -> None:
    """Everything asked for, in the order in which it disturbs the measurements least."""
    folder = Path(request.folder)
    config = AutoConfig.from_pretrained(folder)
    family = family_of(config)
    import_everything(folder, config)
    imported = resident()
    vlm = open_vlm(folder, request.engine)
    gc.collect()
    loaded = resident()

    forget_peak()
    seconds = []
    for sample in [*request.timed[:2], *request.timed]:         # two to warm up
        start = time.perf_counter()
        answer_all(vlm, [sample], family, 1, request.max_new_tokens)
        seconds.append(time.perf_counter() - start)
    highest = peak()

    def tell(done: int, of: int) -> None:
        said.write(f"{done} {of}\n")
        said.flush()

    answers = answer_all(vlm, request.samples, family, request.batch_size, request.max_new_tokens, tell)
    if request.probes:
        prompts = [prompt_of(sample, family) for sample in request.probes]
        np.savez(here / "outputs.npz", **outputs_of(vlm, images_of(request.probes), prompts))
    found = {
        "engine": request.engine,
        "texts": [answer.text for answer in answers],
        "tokens": [list(answer.tokens) for answer in answers],
        "memory": {"imported": imported, "loaded": loaded, "peak": highest},
        "seconds_per_answer": statistics.median(seconds[2:]) if request.timed else None,
        "threads": torch.get_num_threads(),
    }
    (here / "found.json").write_text(json.dumps(found))


def main() -> int:
    here = Path(sys.argv[1])
    said = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):        # what libraries print must not look like progress
            work(Request.read(here / "request.json"), here, said)
    except (VlmqError, FormatError) as fault:
        (here / "refusal").write_text(str(fault))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
