"""Sources of samples: what a person may name after --calibration or --data, each read into `Samples`.

| named                              | read as                                                                         |
|------------------------------------|---------------------------------------------------------------------------------|
| a folder with questions            | VQAv2 (`coco.py`): `questions.json` and `annotations.json`, or the official     |
|                                    | `v2_OpenEnded_*_questions.json` and `v2_*_annotations.json`                     |
| a folder with captions, or a .json | COCO captions (`coco.py`): `captions.json` or the official `captions_*.json`    |
| a .jsonl                           | a sample a line: `image` (relative to the file), `prompt` or `question`,        |
|                                    | and where known `answer` or `answers`, `answer_type`, `id`                      |
| a folder of images                 | each with the prompt in a .txt of the same name, else a caption request         |
| a name                             | a data set of the Hub (`hub_samples.py`), `owner/name` or `owner/name@revision` |
"""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, model_validator

from vlmq.exporter.coco import read_captions, read_questions
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.images import is_image
from vlmq.exporter.json_files import parse, read_text
from vlmq.exporter.samples import COUNT, Sample, Samples, draw, refuse_repeated_ids

QUESTIONS = ("questions.json", "v2_OpenEnded_*_questions.json")
ANNOTATIONS = ("annotations.json", "v2_*_annotations.json")
CAPTIONS = ("captions.json", "captions_*.json")


def read(source: str | Path, count: int | None = COUNT, seed: int = 0, text_only: bool = False) -> Samples:
    """`count` samples of the source, drawn with the seed; None for all (of a Hub data set, at most 1024).

    Every image is known to exist. VlmqError: no such source, images missing, ids repeated, text without an image
    unless `text_only`, nothing in it.
    """
    path = Path(source).expanduser()
    if not path.exists():
        # Only here: the Hub needs a package that not everyone has installed.
        from vlmq.exporter.hub_samples import WINDOW, read_hub

        return read_hub(str(source), count or WINDOW, seed)
    found = _read_folder(path) if path.is_dir() else _read_file(path)
    if not found:
        raise VlmqError(f"{path}: no samples in it; put images there, or files of VQAv2 or COCO")
    refuse_repeated_ids(path, found)
    _refuse_text_alone(path, found, text_only)
    _refuse_missing_images(path, found)
    return Samples(str(source), tuple(found) if count is None else draw(found, count, seed))


def _read_folder(folder: Path) -> list[Sample]:
    questions, captions, lines = _only(folder, QUESTIONS), _only(folder, CAPTIONS), _only(folder, ("*.jsonl",))
    if questions or captions:
        asked = read_questions(questions, _only(folder, ANNOTATIONS)) if questions else []
        return asked + (read_captions(captions) if captions else [])
    return read_jsonl(lines) if lines else read_images(folder)


def _read_file(path: Path) -> list[Sample]:
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix != ".json":
        raise VlmqError(f"{path}: not a source of samples; name a folder, a .json of VQAv2 or COCO, or a .jsonl")
    if any(path.match(pattern) for pattern in QUESTIONS):
        return read_questions(path, _only(path.parent, ANNOTATIONS))
    return read_captions(path)


def _only(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    """The one file that fits; which of several is meant is for the person to say."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if len(found) > 1:
        raise VlmqError(f"{folder}: both {found[0].name} and {found[1].name}; keep one split in a folder")
    return found[0] if found else None


class Line(BaseModel):
    """One line of a .jsonl: `prompt` is used as it is written, `question` goes into the family's template."""

    image: str | None = None
    prompt: str | None = None
    question: str | None = None
    answer: str | None = None
    answers: list[str] = []
    answer_type: str | None = None
    id: str | int | None = None

    @model_validator(mode="after")
    def asks_something(self) -> "Line":
        if self.image is None and self.prompt is None and self.question is None:
            raise ValueError("neither image nor prompt nor question")
        return self


def read_jsonl(path: Path) -> list[Sample]:
    samples = []
    for number, text in enumerate(read_text(path).splitlines(), start=1):
        if not text.strip():
            continue
        line = parse(text, Line, f"{path}:{number}", 'write {"image": "cat.png", "question": "..."}')
        said = line.prompt if line.prompt is not None else line.question
        samples.append(
            Sample(
                id=f"line-{number}" if line.id is None else str(line.id),
                image=None if line.image is None else path.parent / line.image,
                kind="caption" if said is None else "question" if line.prompt is None else "prompt",
                text=said,
                answers=tuple(line.answers if line.answer is None else [line.answer]),
                answer_type=line.answer_type,
            )
        )
    return samples


def read_images(folder: Path) -> list[Sample]:
    """The images of a folder; `cat.txt` holds the prompt of `cat.png`."""
    samples = []
    for image in sorted(filter(is_image, folder.iterdir())):
        beside = image.with_suffix(".txt")
        prompt = read_text(beside).strip() if beside.exists() else ""
        samples.append(Sample(image.name, image, "prompt", prompt) if prompt else Sample(image.name, image, "caption"))
    return samples


def _refuse_missing_images(source: Path, samples: Iterable[Sample]) -> None:
    missing = [sample for sample in samples if sample.image is not None and not sample.image.is_file()]
    if missing:
        first, more = missing[0], len(missing) - 1
        others = f" ({more} more are missing)" if more else ""
        raise VlmqError(f"{source}: no image {first.image} of sample {first.id}{others}; put the images there")


def _refuse_text_alone(source: Path, samples: Iterable[Sample], allowed: bool) -> None:
    alone = [sample for sample in samples if sample.image is None]
    if alone and not allowed:
        raise VlmqError(
            f"{source}: sample {alone[0].id} has no image, as have {len(alone)} in all; give it one, "
            "or say --text-only if text alone is meant"
        )
