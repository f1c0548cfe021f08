"""A task's samples through `datasets` (an optional extra): a folder that it saved, or a data set of the Hub.

Only the chosen rows' images are taken out, as they are stored, into the user's cache.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.tasks.task import Asked, Faults, Task
from vlmq.exporter.json_files import first_fault

if TYPE_CHECKING:
    from datasets import Dataset

SAVED = ("dataset_dict.json", "state.json")
IMAGE = "image"


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((path / name).is_file() for name in SAVED)


class Rows:
    """The rows of one split. `source` names it, with its revision where it has one."""

    def __init__(self, named: str, split: str | None) -> None:
        self.source, self.table = _open(named, split)
        if IMAGE not in self.table.column_names:
            raise VlmqError(f"{named}: no column `{IMAGE}`; name a data set whose rows hold their images")
        import datasets

        if not isinstance(self.table.features[IMAGE], datasets.Image):
            raise VlmqError(f"{named}: column `{IMAGE}` holds no images; cast it to datasets.Image()")

    def asked(self, task: Task, faults: Faults) -> list[Asked]:
        """Every row as a sample, whose image is not on the disk yet; `image` then only says whether there is one."""
        texts = self.table.remove_columns(IMAGE)
        has_image = self._has_image()
        found = []
        for number, row in enumerate(texts):
            shown = {**row, IMAGE: "image"} if has_image[number] else {**row, IMAGE: None}
            try:
                one = task.row(shown, f"row-{number:06}")
            except ValidationError as error:
                faults(
                    f"row-{number:06}", f"{self.source}: row {number}: {first_fault(error)}; name a set of this task"
                )
                continue
            place = Path(f"{number:06}") if has_image[number] else None
            found.append(replace(one, sample=replace(one.sample, image=place)))
        return found

    def with_images(self, asked: Sequence[Asked]) -> list[Asked]:
        """The samples with their images in the cache."""
        stored = self._stored()
        return [self._with_image(one, stored) for one in asked]

    def _with_image(self, one: Asked, stored: Dataset) -> Asked:
        if one.sample.image is None:
            return one
        content = stored[int(one.sample.image.name)][IMAGE]
        path = Path(content["path"] or "")
        if content["bytes"] is not None:  # named by what it holds: questions about one image then share it
            path = _cache() / f"{sha256(content['bytes']).hexdigest()[:32]}{path.suffix or '.image'}"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(f".{os.getpid()}.partial")
                partial.write_bytes(content["bytes"])
                partial.replace(path)
        return replace(one, sample=replace(one.sample, image=path))

    def _stored(self) -> Dataset:
        """The images as they are stored: their bytes, or their path."""
        import datasets

        return self.table.select_columns(IMAGE).cast_column(IMAGE, datasets.Image(decode=False))

    def _has_image(self) -> list[bool]:
        """Of every row; the images themselves are not read."""
        batches = self._stored().with_format("arrow").iter(batch_size=1000)
        return [valid for batch in batches for valid in batch.column(IMAGE).is_valid().to_pylist()]


def _cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return home / "vlmq" / "evaluation"


def _open(named: str, split: str | None) -> tuple[str, Dataset]:
    try:
        import datasets
    except ImportError:
        raise VlmqError(f"{named}: needs another package; `pip install 'vlmq[datasets]'`") from None
    path = Path(named).expanduser()
    if path.is_dir():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.Dataset):
            return named, loaded
        if split not in loaded:
            raise VlmqError(f"{named}: no split {split}; choose --split from {', '.join(loaded)}")
        return f"{named}:{split}", loaded[split]
    return _from_hub(named, split)


def _from_hub(named: str, split: str | None) -> tuple[str, Dataset]:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, _, revision = named.partition("@")
    try:
        pinned = HfApi().dataset_info(name, revision=revision or None).sha
        splits = datasets.get_dataset_split_names(name, revision=pinned)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise VlmqError(f"{named}: no split {split}; choose --split from {', '.join(splits)}")
        table = datasets.load_dataset(name, revision=pinned, split=split)
    except (OSError, HfHubHTTPError, HFValidationError, ValueError, RuntimeError) as fault:
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise VlmqError(f"{named}: no such folder, and not to be had from the Hub ({reason}); check --data") from None
    return f"{name}@{pinned}:{split}", table
