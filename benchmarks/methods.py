"""Every method at every budget on the demos and on their outlier variants: accuracy and divergence, three seeds.

    python benchmarks/methods.py [--only REGEX] [--workers 2] [--fresh] [--report]

Asks 2000 evaluation questions, whose pictures are not among those calibrated on. Rows are appended to
results/methods.jsonl as they are done; a run that was ended goes on where it was. Then, or at once with --report, it
writes results/methods.json, results/methods.md and docs/methods.png (see table.py, verdicts.py).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import signal
import sys
import time
import traceback
from base64 import b64encode
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import common
import numpy as np
import table
import torch
from cells import read
from configurations import REFERENCE, Row, rows

from vlmq.exporter.calibration import Inputs, prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.demo import outliers
from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.load import load
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.search.packed import Scorer, Scores
from vlmq.exporter.simulate import simulate_batches
from vlmq.exporter.solving import Solved
from vlmq.formats import json_lines
from vlmq.formats.compressed_tensors import packed_bytes

SAMPLES = 128  # of a calibration
MEASURED = common.RESULTS / "methods.jsonl"
CACHE = Path(gettempdir()) / "vlmq-benchmarks"  # outlier variants and the references' logits


@cache
def digest(checkpoint: str) -> str:
    """Of all that an outlier variant is made from."""
    found = hashlib.sha256(Path(outliers.__file__).read_bytes())
    for file in sorted(CHECKPOINTS[checkpoint].iterdir()):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def folder_of(checkpoint: str, variant: str, seed: int) -> Path:
    if variant == "plain":
        return CHECKPOINTS[checkpoint]
    return CACHE / f"{checkpoint}-{variant}-{seed}-{digest(checkpoint)}"


def make_variant(checkpoint: str, variant: str, seed: int) -> None:
    """Make the folder of a variant, whole or not at all."""
    target = folder_of(checkpoint, variant, seed)
    if target.exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=CACHE) as work:
        outliers.make_outliers(CHECKPOINTS[checkpoint], Path(work) / "made", seed).rename(target)


@cache
def scorer(checkpoint: str) -> Scorer:
    return Scorer(open_checkpoint(str(CHECKPOINTS[checkpoint])), common.some_questions())


@cache
def calibration(checkpoint: str, seed: int) -> list[Inputs]:
    found = open_checkpoint(str(CHECKPOINTS[checkpoint]))
    return prepare(common.calibration(SAMPLES, seed), common.processor_of(found.folder), found.family)


@cache
def reference_logits(checkpoint: str, variant: str, seed: int) -> np.ndarray:
    """(questions, vocabulary) float64: each answer's first token, by the checkpoint as it is."""
    seed = 0 if variant == "plain" else seed
    file = CACHE / f"{checkpoint}-{variant}-{seed}-{digest(checkpoint)}-{common.SOME}.npy"
    if not file.exists():
        found = scorer(checkpoint).score(load(folder_of(checkpoint, variant, seed))).logits
        CACHE.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=CACHE) as work:
            np.save(Path(work) / file.name, found)
            (Path(work) / file.name).rename(file)
    return np.load(file).astype(np.float64)


def measure(row: Row) -> dict[str, Any]:
    """What is kept of a row; `refused` holds the message where its recipe is."""
    kept: dict[str, Any] = {
        "checkpoint": row.checkpoint,
        "variant": row.variant,
        "seed": row.seed,
        **asdict(row.configuration),
    }
    checkpoint = open_checkpoint(str(folder_of(row.checkpoint, row.variant, row.seed)))
    asked = scorer(row.checkpoint)
    begun = time.process_time()
    if row.configuration == REFERENCE:
        model, solved = load(checkpoint.folder), {}
    else:
        kept["recipe"] = row.configuration.recipe
        try:
            recipe = make_recipe(row.configuration.recipe)
            model, solved = simulate_batches(checkpoint, recipe, calibration(row.checkpoint, row.seed))
        except VlmqError as refusal:
            return {**kept, "refused": str(refusal)}
    quantized = time.process_time()
    scores = asked.score(model)
    evaluated = time.process_time()
    reference = reference_logits(row.checkpoint, row.variant, row.seed)
    return {
        **kept,
        **_figures(scores, reference, asked.image),
        "bits_per_weight": bits_per_weight(solved) if solved else 16.0,
        "quantize_seconds": round(quantized - begun, 2),  # of processor time
        "evaluate_seconds": round(evaluated - quantized, 2),
    }


def _figures(scores: Scores, reference: np.ndarray, image: np.ndarray) -> dict[str, Any]:
    """right: a bit a question, and divergences: a float16 an image, both as base64; table.py reads them."""
    if not np.isin(scores.right, (0, 1)).all():
        raise ValueError("annotators who disagree; only answers that are right or wrong can be kept as bits")
    found = common.divergences(reference, scores.logits.astype(np.float64))
    by_image = np.bincount(image, found) / np.bincount(image)
    return {
        "accuracy": 100 * float(scores.right.mean()),
        "divergence": float(found.mean()),
        "right": b64encode(np.packbits(scores.right.astype(bool)).tobytes()).decode(),
        "divergences": b64encode(by_image.astype(np.float16).tobytes()).decode(),
    }


def bits_per_weight(solved: dict[str, Solved]) -> float:
    """Of the quantized linears, as files would hold them: scales and zeros counted, biases and the rest not."""
    shapes = [(tuple(site.weight.shape), site.scheme.grid.stored) for site in solved.values()]
    stored = sum(packed_bytes((out, columns), grid) for (out, columns), grid in shapes)
    return 8 * stored / sum(out * columns for (out, columns), _ in shapes)


def run(wanted: list[Row], workers: int) -> bool:
    """Measure rows, and keep each as it is done; False where any failed, with the traceback said."""
    MEASURED.parent.mkdir(exist_ok=True)
    began, good, revision = time.monotonic(), True, common.revision()  # of the code that the workers load now
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        variants = dict.fromkeys((row.checkpoint, row.variant, row.seed) for row in wanted if row.variant != "plain")
        for made in [pool.submit(make_variant, *variant) for variant in variants]:
            made.result()
        futures: dict[Future[dict[str, Any]], Row] = {pool.submit(measure, row): row for row in wanted}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                try:
                    kept = future.result()
                except Exception:  # another row may well work; this one is left for the next run
                    good = False
                    print(f"{futures[future]} failed:", file=sys.stderr)
                    traceback.print_exc()
                    continue
                json_lines.append(MEASURED, {**kept, "revision": revision})
                left = (time.monotonic() - began) / done * (len(wanted) - done) / 60
                print(f"{done}/{len(wanted)}, {left:.0f} min left: {futures[future]}: {said(kept)}", flush=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return good


def said(kept: dict[str, Any]) -> str:
    if "refused" in kept:
        return f"refused ({kept['refused']})"
    return (
        f"{kept['accuracy']:.2f} %, KL {kept['divergence']:.4f}, {kept['bits_per_weight']:.2f} bits, "
        f"{kept['quantize_seconds']:.1f} + {kept['evaluate_seconds']:.1f} s"
    )


def unmeasured(all_rows: Iterable[Row]) -> list[Row]:
    """Those that no line has, or only a refusal."""
    measured = {row for row, kept in read(MEASURED).items() if "refused" not in kept}
    return [row for row in all_rows if row not in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="rows whose name this finds")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--list", action="store_true", help="name the rows that are left, and end")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the workers end too
    if options.fresh:
        MEASURED.unlink(missing_ok=True)
    wanted = [row for row in unmeasured(rows()) if options.only.search(str(row))]
    if options.list:
        print(*wanted, sep="\n")
        return
    good = options.report or run(wanted, options.workers)
    table.report(MEASURED)
    if not good:
        sys.exit("some rows failed; run again to try them anew")


if __name__ == "__main__":
    main()
