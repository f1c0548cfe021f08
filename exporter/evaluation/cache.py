"""The measurement of a reference, kept: several exports of one model need it measured only once."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from shutil import rmtree

import torch
import transformers

import vlmq
from vlmq.exporter.evaluation.measure import FOUND, Measurement
from vlmq.exporter.samples import Sample
from vlmq.formats.folder import staged


@contextmanager
def reference_folder(
    cache: Path | None, reference: Path, samples: Sequence[Sample], work: Path
) -> Iterator[tuple[Path, Measurement | None]]:
    """A folder to measure into, or the measurement that is known.

    Without a cache the folder is in `work`. With one it appears there, under a name that tells model and samples, when
    the block ends well.
    """
    if cache is None:
        folder = work / "reference"
        folder.mkdir()
        yield folder, None
        return
    final = cache / _identity(reference, samples)
    if (final / FOUND).is_file():
        yield final, Measurement.read(final)
        return
    cache.mkdir(parents=True, exist_ok=True)
    rmtree(final, ignore_errors=True)
    with staged(final) as folder:
        yield folder, None


def _identity(reference: Path, samples: Sequence[Sample]) -> str:
    """Everything that a measurement depends on, hashed: files are told by size and time, not read."""
    files = [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(reference.resolve().iterdir())
        if path.is_file()
    ]
    said = {
        "versions": [vlmq.__version__, torch.__version__, transformers.__version__],
        "machine": [platform.node(), platform.machine(), torch.get_num_threads()],
        "reference": [str(reference.resolve()), files],
        "samples": [asdict(sample) for sample in samples],
    }
    return sha256(json.dumps(said, default=str).encode()).hexdigest()[:32]
