"""The process that measures one model: `python -m vlmq.exporter.evaluation.worker WORK`, started by `measure.py`.

Reads WORK/request.json; says `DONE OF` on its standard output as it answers; writes WORK/found.json and
WORK/outputs.npz, or WORK/refusal with one line for a person.
"""

import contextlib
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.answers import answer_all, images_of
from vlmq.exporter.evaluation.components import outputs_of
from vlmq.exporter.evaluation.measure import Request
from vlmq.exporter.evaluation.memory import forget_peak, peak, resident
from vlmq.exporter.runtime import Engine, open_processor, open_vlm, without_torch
from vlmq.exporter.samples import prompt_of
from vlmq.formats.errors import FormatError

BATCH_BYTES = 2 * 1024**3
PROMPT_TOKENS = 64


def import_everything(folder: Path, engine: Engine) -> None:
    """Import the engine, and what transformers imports at a first use: that is not memory of the model."""
    from transformers import AutoConfig

    if engine == "onnx":
        import onnxruntime  # noqa: F401
    else:
        from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        import vlmq.exporter.load  # noqa: F401

        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(AutoConfig.from_pretrained(folder))]
    open_processor(folder)
    gc.collect()


def work(request: Request, here: Path, said: TextIO) -> None:
    """Everything asked for, in the order in which it disturbs the measurements least."""
    folder = Path(request.folder)
    import_everything(folder, request.engine)
    from transformers import AutoConfig

    from vlmq.exporter.families import family_of

    config = AutoConfig.from_pretrained(folder)
    family = family_of(config)
    imported = resident()
    vlm = open_vlm(folder, request.engine)
    gc.collect()
    loaded = resident()

    forget_peak()
    seconds = []
    for sample in [*request.timed[:2], *request.timed]:  # two to warm up
        start = time.perf_counter()
        answer_all(vlm, [sample], family, 1, request.max_new_tokens)
        seconds.append(time.perf_counter() - start)
    highest = peak()

    def tell(done: int, of: int) -> None:
        said.write(f"{done} {of}\n")
        said.flush()

    batch_size = fitting(config, request.batch_size)
    answers = answer_all(vlm, request.samples, family, batch_size, request.max_new_tokens, tell)
    if request.probes:
        prompts = [prompt_of(sample, family) for sample in request.probes]
        np.savez(here / "outputs.npz", **outputs_of(vlm, images_of(request.probes), prompts))
    found = {
        "engine": request.engine,
        "texts": [answer.text for answer in answers],
        "tokens": [list(answer.tokens) for answer in answers],
        "memory": {"imported": imported, "loaded": loaded, "peak": highest},
        "seconds_per_answer": statistics.median(seconds[2:]) if request.timed else None,
        "threads": _threads(request.engine),
    }
    (here / "found.json").write_text(json.dumps(found))


def fitting(config: Any, wanted: int) -> int:
    """The largest batch whose caches and logits stay within BATCH_BYTES; at least 1, at most `wanted`."""
    return max(1, min(wanted, BATCH_BYTES // sample_bytes(config)))


def sample_bytes(config: Any) -> int:
    """Bytes of the caches and logits of one sample, float32."""
    text = config.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    tokens = (
        getattr(config, "num_query_tokens", None) or getattr(config, "image_seq_length", None) or 576
    ) + PROMPT_TOKENS
    return 4 * tokens * (2 * text.num_hidden_layers * width + text.vocab_size)


def _threads(engine: Engine) -> int:
    """Those that one operator runs on."""
    if engine == "onnx":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    import torch

    return torch.get_num_threads()


def main() -> int:
    here = Path(sys.argv[1])
    request = Request.read(here / "request.json")
    if request.engine == "onnx":
        without_torch()  # as where people deploy: the graphs need none of it
    said = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print must not look like progress
            work(request, here, said)
    except (VlmqError, FormatError) as fault:
        (here / "refusal").write_text(str(fault))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
