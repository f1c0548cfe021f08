"""A retrieval model on a set of captioned images: every image looks for its captions, every caption for its image.

Features are kept on the disk batch by batch, so that a run that was ended goes on there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.ranking import OUT, belonging, first, ranks, similarity
from vlmq.exporter.evaluation.records import Record
from vlmq.exporter.evaluation.retriever import Retriever
from vlmq.exporter.evaluation.tasks.retrieval import IMAGE_TO_TEXT, TEXT_TO_IMAGE, ids_of
from vlmq.exporter.evaluation.tasks.task import Asked
from vlmq.exporter.images import open_image
from vlmq.exporter.progress import Progress, silent


@dataclass(frozen=True)
class Shelf:
    """Features on the disk, in a folder that is named after the run they belong to."""

    folder: Path

    @staticmethod
    def beside(out: Path, identity: str) -> Shelf:
        return Shelf(out.with_name(f".{out.name}.{sha256(identity.encode()).hexdigest()[:16]}.features"))

    def part(self, ids: Sequence[str]) -> Shelf:
        """For some of the samples: which of them could be decoded may change between a run and the next."""
        return Shelf(self.folder / sha256("\n".join(ids).encode()).hexdigest()[:16])

    def get(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            save_file({"features": np.ascontiguousarray(make())}, part)
            part.replace(file)
        return load_file(file)["features"]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def retrieve(
    model: Retriever,
    asked: Sequence[Asked],
    names: Sequence[str | None],
    batch_size: int,
    rerank: int,
    skip_bad: bool,
    shelf: Shelf,
    progress: Progress = silent,
) -> list[Record]:
    """A record for every image and every caption, with the rank of what it looks for; failed images first of all.

    names: of the images, for the records. rerank: how many of the most similar the matching head looks at; 0: none,
    and similarity alone ranks. VlmqError for an image that cannot be decoded, unless `skip_bad`.
    """
    failed = dict(_undecodable(asked, skip_bad))
    good = [place for place in range(len(asked)) if place not in failed]
    records = [Record(id=id_, failed=line) for place, line in failed.items() for id_ in ids_of(asked[place])]
    if not good:
        return records
    paths = [path for place in good if (path := asked[place].sample.image) is not None]
    texts = [text for place in good for text in asked[place].sample.answers]
    owners = [row for row, place in enumerate(good) for _ in asked[place].sample.answers]

    def seen(start: int) -> np.ndarray:
        return model.image_features([open_image(path) for path in paths[start : start + batch_size]])

    def read(start: int) -> np.ndarray:
        return model.text_features(texts[start : start + batch_size])

    shelf = shelf.part([asked[place].sample.id for place in good])
    images = np.concatenate(list(_batches("images", len(paths), batch_size, seen, shelf, progress)))
    captions = np.concatenate(list(_batches("texts", len(texts), batch_size, read, shelf, progress)))
    scores = similarity(images, captions)  # (images, texts)
    by_image, by_text = scores, scores.T
    if rerank:
        by_image, by_text = _reranked(model, scores, paths, texts, rerank, batch_size, progress)
    right = belonging(owners, len(paths))
    for row, rank in enumerate(ranks(by_image, right)):
        sample, name = asked[good[row]].sample, names[good[row]]
        records.append(
            Record(
                id=sample.id,
                image=name,
                references=sample.answers,
                groups=(IMAGE_TO_TEXT,),
                answer=texts[int(by_image[row].argmax())],
                rank=int(rank),
            )
        )
    query_ids = [id_ for place in good for id_ in ids_of(asked[place])[1:]]
    for column, rank in enumerate(ranks(by_text, right.T)):
        sample, name = asked[good[owners[column]]].sample, names[good[owners[column]]]
        records.append(
            Record(
                id=query_ids[column],
                image=name,
                question=texts[column],
                references=(sample.id,),
                groups=(TEXT_TO_IMAGE,),
                answer=asked[good[int(by_text[column].argmax())]].sample.id,
                rank=int(rank),
            )
        )
    return records


def _undecodable(asked: Sequence[Asked], skip_bad: bool) -> Iterator[tuple[int, str]]:
    """All images are looked at first: one that is found bad later would change whom all the others compete with."""
    for place, one in enumerate(asked):
        if one.sample.image is None:
            line = f"{one.sample.id}: has no image; retrieval needs one"
        else:
            try:
                open_image(one.sample.image)
                continue
            except VlmqError as fault:
                line = str(fault)
        if not skip_bad:
            raise VlmqError(f"sample {one.sample.id}: {line}, or pass --skip-bad to count it as failed")
        yield place, line


def _batches(
    what: str, of: int, size: int, make: Callable[[int], np.ndarray], shelf: Shelf, progress: Progress
) -> Iterator[np.ndarray]:
    progress(what, 0, of)
    for start in range(0, of, size):
        yield shelf.get(f"{what}-{start:08}", lambda start=start: make(start))  # type: ignore[misc]
        progress(what, min(start + size, of), of)


def _reranked(
    model: Retriever,
    scores: np.ndarray,
    paths: Sequence[Path],
    texts: Sequence[str],
    count: int,
    batch_size: int,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """(images, texts), (texts, images): similarity and matching logit of the first `count` of each row, else OUT.

    The two directions share the pairs that are among the first in both. BLIP-2, section 4.4.
    """
    rows, columns = first(scores, count), first(scores.T, count).T
    matched = np.full(scores.shape, OUT, dtype=np.float32)
    for row, wanted in enumerate(rows | columns):
        places = np.flatnonzero(wanted)
        picture = open_image(paths[row])
        for start in range(0, len(places), batch_size):
            some = places[start : start + batch_size]
            matched[row, some] = scores[row, some] + model.matches(picture, [texts[place] for place in some])
        progress("matching", row + 1, len(paths))
    return np.where(rows, matched, OUT), np.where(columns, matched, OUT).T
