"""The process that measures one model: `python -m vlmq.exporter.evaluation.worker WORK`, started by `measure.py`.

Reads WORK/request.json; says `DONE OF` on its standard output as it answers; writes WORK/found.json and
WORK/outputs.npz, or WORK/refusal with one line for a person.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.answers import answer_all, images_of
from vlmq.exporter.evaluation.components import blocks_of, outputs_of
from vlmq.exporter.evaluation.measure import COMPARED, Measurement, Memory, Request
from vlmq.exporter.evaluation.memory import forget_peak, peak, resident
from vlmq.exporter.evaluation.sensitivity import Shown, shown
from vlmq.exporter.evaluation.speed import Speed, speed_of
from vlmq.exporter.runtime import Engine, open_processor, open_vlm, without_torch
from vlmq.exporter.samples import Templates, prompt_of
from vlmq.formats.errors import FormatError

BATCH_BYTES = 2 * 1024**3
PROMPT_TOKENS = 64
WARMING = 8  # answers, one at a time, that the peak is of; after them nothing is new to the engine


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


def work(request: Request, tell: Callable[[int, int], None] = lambda done, of: None) -> Measurement:
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
    for sample in request.timed[:WARMING]:
        answer_all(vlm, [sample], family, 1, request.max_new_tokens)
    highest = peak()

    def timed() -> Speed | None:
        if not request.timed:
            return None
        prompts = [prompt_of(sample, family) for sample in request.timed]
        return speed_of(vlm, images_of(request.timed), prompts, request.max_new_tokens)

    speed = None if request.timed_last else timed()
    batch_size = fitting(config, request.batch_size)
    answers = answer_all(vlm, request.samples, family, batch_size, request.max_new_tokens, tell)
    known = {sample.id: list(answer.tokens) for sample, answer in zip(request.samples, answers, strict=True)}
    looks, lengths, outputs = _look(vlm, request, family, batch_size, known)
    return Measurement(
        engine=request.engine,
        texts=[answer.text for answer in answers],
        tokens=[list(answer.tokens) for answer in answers],
        memory=Memory(imported, loaded, highest),
        speed=timed() if request.timed_last else speed,
        threads=_threads(request.engine),
        shown=looks,
        lengths=lengths,
        outputs=outputs,
    )


def _look(
    vlm: Any, request: Request, templates: Templates, batch_size: int, known: dict[str, list[int]]
) -> tuple[Shown, list[int], dict[str, np.ndarray]]:
    """The probes, closely: what other images change, the positions of each answer, and outputs by name.

    known: tokens of answers by the id of their sample; probes that are not among them are asked.
    """
    if not request.probes:
        return Shown([], [], []), [], {}
    prompts = [prompt_of(sample, templates) for sample in request.probes]
    images = images_of(request.probes)
    ids = [probe.id for probe in request.probes]
    own = [known[id_] for id_ in ids] if known.keys() >= set(ids) else None
    looks = shown(vlm, images, prompts, batch_size, request.max_new_tokens, own)
    answers = looks.own if request.forced is None else request.forced
    logits: list[np.ndarray] = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        logits += vlm.forced_logits(images[part], prompts[part], answers[part])
    outputs = outputs_of(vlm, images[:COMPARED], prompts[:COMPARED])
    outputs |= {f"block:{name}": states for name, states in blocks_of(vlm, images, prompts).items()}
    return looks, [len(rows) for rows in logits], {**outputs, "logits": np.concatenate(logits)}


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

    def tell(done: int, of: int) -> None:
        said.write(f"{done} {of}\n")
        said.flush()

    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print must not look like progress
            work(request, tell).write(here)
    except (VlmqError, FormatError) as fault:
        (here / "refusal").write_text(str(fault))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
