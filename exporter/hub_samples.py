"""Samples from a data set of the Hugging Face Hub, through the optional `datasets`, always at one pinned revision.

Rows are streamed, so that a calibration of 128 images does not download gigabytes: the draw is from the first
WINDOW rows of the split. The drawn images are kept, without loss, in the user's cache.
"""

import os
import re
from pathlib import Path
from typing import Any

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.images import SUFFIXES
from vlmq.exporter.samples import Sample, Samples, draw

# What a Hub model is calibrated on when nothing is named: photographs with five captions each, as peers use.
DEFAULT = "lmms-lab/flickr30k@0d6d9049be2e08261be315e731e0d8054c1d1c03"
WINDOW = 1024
SPLITS = ("train", "validation", "test")
REMEDY = "pass a folder, .json or .jsonl of your own with --calibration"


def read_hub(source: str, count: int, seed: int) -> Samples:
    """`count` samples of `owner/name` or `owner/name@revision`; the source returned carries the full revision."""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source)
    if not is_name or Path(source).suffix in {".json", ".jsonl", *SUFFIXES}:
        raise VlmqError(f"{source}: no such file or folder; check the path")
    try:
        import datasets
    except ImportError:
        raise VlmqError(
            f"{source}: no such file or folder, and a data set of the Hub needs another package; "
            f"`pip install 'vlmq[datasets]'`, or {REMEDY}"
        ) from None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = source.partition("@")
    try:
        pinned = HfApi().dataset_info(name, revision=revision or None).sha
        splits = datasets.get_dataset_split_names(name, revision=pinned)
        split = next((split for split in SPLITS if split in splits), splits[0])
        rows = list(datasets.load_dataset(name, revision=pinned, split=split, streaming=True).take(WINDOW))
    except (OSError, HfHubHTTPError, ValueError, RuntimeError) as fault:  # offline, unknown, gated, or by a script
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise VlmqError(f"{source}: cannot be fetched from the Hub ({reason}); {REMEDY}") from None
    chosen = draw((_sample_of(source, number, row) for number, row in enumerate(rows)), count, seed)
    cache = _cache(name, str(pinned))
    return Samples(f"{name}@{pinned}", tuple(_kept(sample, rows, cache) for sample in chosen))


def _sample_of(source: str, number: int, row: dict[str, Any]) -> Sample:
    """A row as a sample whose image is not on disk yet; its id is the row's number."""
    if row.get("image") is None:
        raise VlmqError(f"{source}: row {number} has no column `image`; name a data set of images, or {REMEDY}")
    question = row.get("question")
    said = row.get("answers") if question else row.get("caption", row.get("captions"))
    said = said if said is not None else row.get("answer", ())
    said = [said] if isinstance(said, str) else said
    answers = tuple(str(item["answer"] if isinstance(item, dict) else item) for item in said)
    kind = "question" if question else "caption"
    return Sample(f"row-{number:06}", None, kind, question, answers, row.get("answer_type"))


def _kept(sample: Sample, rows: list[dict[str, Any]], cache: Path) -> Sample:
    """The sample with its image in the cache."""
    path = cache / f"{sample.id}.png"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        rows[int(sample.id.removeprefix("row-"))]["image"].convert("RGB").save(partial, format="PNG")
        partial.replace(path)
    return Sample(sample.id, path, sample.kind, sample.text, sample.answers, sample.answer_type)


def _cache(name: str, revision: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return home / "vlmq" / "datasets" / name.replace("/", "--") / revision
