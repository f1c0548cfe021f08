"""Asking a model in a folder about one picture: what `vlmq run` does, for Python too.

from vlmq.exporter.asking import ask
print(ask("blip2-mini-awq-w4", "cat.png", "what is it?").text)
"""

from pathlib import Path

from transformers import AutoConfig

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import family_of
from vlmq.exporter.images import open_image
from vlmq.exporter.runtime import Answer, Engine, engine_of, open_vlm
from vlmq.exporter.samples import Sample, prompt_of


def ask(
    folder: str | Path,
    image: str | Path,
    prompt: str | None = None,
    engine: Engine | None = None,
    max_new_tokens: int = 30,
    raw: bool = False,
) -> Answer:
    """The greedy answer to a question about a picture (its description without one).

    raw: the prompt is used as it is, not put into the family's template. VlmqError for a folder that cannot be run.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise VlmqError(f"{folder}: has no config.json; name a folder that vlmq export wrote")
    if engine == "onnx" and not (folder / "onnx").is_dir():
        raise VlmqError(f"{folder}: has no onnx/; export with --format both, or pass --engine torch")
    picture = open_image(Path(image))
    if not (raw and prompt is not None):
        kind = "caption" if prompt is None else "question"
        prompt = prompt_of(Sample("prompt", Path(image), kind, prompt), family_of(AutoConfig.from_pretrained(folder)))
    return open_vlm(folder, engine or engine_of(folder)).generate([picture], [prompt], max_new_tokens)[0]
