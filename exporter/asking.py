"""Asking a model in a folder about pictures: what `vlmq run` does, for Python too.

from vlmq.exporter.asking import ask
print(ask("blip2-mini-awq-w4", ["cat.png"], ["what is it?"])[0].text)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoConfig

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import family_of
from vlmq.exporter.images import open_image
from vlmq.exporter.runtime import (
    GREEDY,
    Answer,
    Engine,
    OnnxVlm,
    Piece,
    Provider,
    Sampling,
    TorchVlm,
    engine_of,
    open_vlm,
)
from vlmq.exporter.samples import Sample, prompt_of


def ask(
    folder: str | Path,
    images: Sequence[str | Path],
    prompts: Sequence[str] = (),
    engine: Engine | None = None,
    max_new_tokens: int = 30,
    raw: bool = False,
    sampling: Sampling = GREEDY,
    provider: Provider = "cpu",
) -> list[Answer]:
    """The answers to questions about pictures, one batch; without questions, the pictures are described.

    As many images as prompts; or one of either, for all of the others. raw: prompts are used as they are, not put into
    the family's template. VlmqError for a folder that cannot be run.
    """
    vlm, asked = _prepared(folder, images, prompts, engine, raw, provider)
    return vlm.generate(*asked, max_new_tokens, sampling)


def stream(
    folder: str | Path,
    images: Sequence[str | Path],
    prompts: Sequence[str] = (),
    engine: Engine | None = None,
    max_new_tokens: int = 30,
    raw: bool = False,
    sampling: Sampling = GREEDY,
    provider: Provider = "cpu",
) -> Iterator[Piece]:
    """What `ask` answers, piece by piece as it is said."""
    vlm, asked = _prepared(folder, images, prompts, engine, raw, provider)
    return vlm.stream(*asked, max_new_tokens, sampling)


def _prepared(
    folder: str | Path,
    images: Sequence[str | Path],
    prompts: Sequence[str],
    engine: Engine | None,
    raw: bool,
    provider: Provider,
) -> tuple[OnnxVlm | TorchVlm, tuple[list, list[str]]]:
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise VlmqError(f"{folder}: has no config.json; name a folder that vlmq export wrote")
    if engine == "onnx" and not (folder / "onnx").is_dir():
        raise VlmqError(f"{folder}: has no onnx/; export with --format both, or pass --engine torch")
    engine = engine or engine_of(folder)
    if engine == "torch" and provider != "cpu":
        raise VlmqError(f"{provider}: a provider is onnxruntime's; pass --engine onnx, or leave --provider out")
    pictures = {image: open_image(Path(image)) for image in images}
    family = family_of(AutoConfig.from_pretrained(folder))

    def whole(image: str | Path, prompt: str | None) -> str:
        if raw and prompt is not None:
            return prompt
        kind = "caption" if prompt is None else "question"
        return prompt_of(Sample("prompt", Path(image), kind, prompt), family)

    pairs = _paired(images, prompts or [None])
    asked = [pictures[image] for image, _ in pairs], [whole(image, prompt) for image, prompt in pairs]
    return open_vlm(folder, engine, provider), asked


def _paired(images: Sequence[str | Path], prompts: Sequence[str | None]) -> list[tuple[str | Path, str | None]]:
    count = max(len(images), len(prompts))
    if len(images) not in (1, count) or len(prompts) not in (1, count):
        raise VlmqError(
            f"{len(images)} images and {len(prompts)} prompts: do not pair up; give as many of both, or one of either"
        )
    return [
        (images[place % len(images)], prompts[place % len(prompts)])  # one of either is all of the others'
        for place in range(count)
    ]
