"""What allocated bits bring against uniform ones of equal bytes, by the same method, on questions and on captions.

    python benchmarks/allocation.py [--only REGEX] [--workers 2] [--device auto] [--report] [--list]

Each row is a demo, plain or with outlier channels, a method, and a seed of the calibration. The bytes are those of the
uniform recipe at 3 and at 4 bits; `vlmq allocate` is asked once for each task, with some 1024 questions or 512 caption
requests, and both recipes are quantized as an export quantizes them and asked the same 2400 questions and 600 caption
requests about 600 other pictures, of which none was calibrated on. Rows are kept in results/allocation.jsonl as they
are done, so that a run goes on where it was stopped; results/allocation.json has the paired differences.

The interval is of pictures (the cluster bootstrap); over several seeds each picture counts with its mean over them.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import methods
import numpy as np
import torch

from vlmq.exporter.calibration import prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.data import demo_folder
from vlmq.exporter.devices import device_of
from vlmq.exporter.evaluation.metrics.cider import cider
from vlmq.exporter.evaluation.metrics.ptb import tokens
from vlmq.exporter.evaluation.statistics import in_words, paired_difference
from vlmq.exporter.load import load
from vlmq.exporter.recipe import Recipe, make_recipe
from vlmq.exporter.runtime import open_processor
from vlmq.exporter.samples import Sample
from vlmq.exporter.search import allocate
from vlmq.exporter.search.grid import Configuration
from vlmq.exporter.search.packed import Scorer, Scores
from vlmq.exporter.search.pieces import plan
from vlmq.exporter.search.tasks import TASKS, divergences, log_softmax
from vlmq.exporter.simulate import simulate_batches
from vlmq.exporter.sources import read
from vlmq.exporter.walk import walk
from vlmq.formats import json_lines

MEASURED = common.RESULTS / "allocation.jsonl"
GROUP, SAMPLES, DRAWN = 64, 128, 1536
BUDGETS = (3, 4)  # bits of the uniform recipe whose bytes an allocated one may have
ASKED = ("vqa", "captions")
SCORE = {"vqa": ("accuracy", 1.0), "captions": ("CIDEr", 0.01)}  # and what its unit is, of a point


@dataclass(frozen=True)
class Row:
    checkpoint: str
    variant: str
    method: str
    seed: int  # of the calibration; the outlier variant is always that of seed 0

    def __str__(self) -> str:
        return f"{self.checkpoint}/{self.variant}/{self.method}/{self.seed}"


def rows() -> list[Row]:
    return [
        Row(checkpoint, variant, method, seed)
        for seed in (0, 1, 2)
        for checkpoint in ("blip2-mini", "llava-mini")
        for variant in ("plain", "outliers")
        for method in ("rtn", "awq", "gptq")
    ]


@cache
def samples(task: str) -> tuple[Sample, ...]:
    """Every one of the demo's evaluation set."""
    everything = read(demo_folder("evaluation"), None).samples
    return tuple(sample for sample in everything if sample.kind == TASKS[task].kind)


@cache
def scorer(checkpoint: str, task: str) -> Scorer:
    kind = TASKS[task]
    return Scorer(
        open_checkpoint(checkpoint), samples(task), longest=kind.evaluated.max_new_tokens, tell_all=kind.tell_all
    )


def by_picture(checkpoint: str, task: str, reference: Scores, found: Scores) -> tuple[np.ndarray, np.ndarray]:
    """(pictures,) twice: the mean score of a picture's questions, or its caption's, and the mean divergence."""
    asked = scorer(checkpoint, task)
    score = found.right
    if task == "captions":
        annotated = [list(map(tokens, sample.answers)) for sample in asked.samples]
        score = np.array(cider([tokens(text) for text in found.texts], annotated))
    told = divergences(log_softmax(reference.logits), log_softmax(found.logits))
    each = np.add.reduceat(told, found.told.cumsum() - found.told) / found.told
    count = np.bincount(asked.image)
    return np.bincount(asked.image, score) / count, np.bincount(asked.image, each) / count


@cache
def reference(checkpoint: str, folder: Path, task: str, device: torch.device) -> Scores:
    return scorer(checkpoint, task).score(load(folder).to(device))  # type: ignore[arg-type]


def measure(row: Row, device: str) -> dict[str, Any]:
    """Of both tasks and budgets: scores and divergences by picture, of the uniform recipe and the allocated one."""
    folder = methods.folder_of(row.checkpoint, row.variant, 0)
    checkpoint = open_checkpoint(str(folder))
    skeleton = checkpoint.skeleton()
    plain = walk(skeleton, checkpoint.family)
    source, there = demo_folder("asking"), device_of(device)
    calibrated = read(source, SAMPLES, row.seed).samples
    batches = prepare(calibrated, open_processor(checkpoint.folder), checkpoint.family)
    uniform = {bits: {"method": row.method, "bits": bits, "group_size": GROUP} for bits in BUDGETS}
    sizes = {
        bits: plan(Configuration("it", "it", recipe), checkpoint, skeleton, plain).bytes
        for bits, recipe in uniform.items()
    }
    begun = time.process_time()

    def scored(recipe: Recipe, tasks: Sequence[str]) -> dict[str, list[str]]:
        model, _ = simulate_batches(checkpoint, recipe, batches, there)
        found = {task: scorer(row.checkpoint, task).score(model) for task in tasks}
        references = {task: reference(row.checkpoint, folder, task, there) for task in tasks}
        return {
            task: [_kept(values) for values in by_picture(row.checkpoint, task, references[task], scores)]
            for task, scores in found.items()
        }

    before = {bits: scored(make_recipe(recipe), ASKED) for bits, recipe in uniform.items()}
    results = []
    for task in ASKED:
        request = allocate.Request(
            str(folder),
            "",
            make_recipe(uniform[BUDGETS[0]]),
            task,
            calibration=str(source),
            samples=SAMPLES,
            asked=DRAWN,
            seed=row.seed,
            device=device,
        )
        chosen = allocate.allocations(request, [str(size) for size in sizes.values()])
        for (bits, size), found in zip(sizes.items(), chosen, strict=True):
            results.append(
                {
                    "task": task,
                    "bits": bits,
                    "bytes": {"uniform": size, "allocated": found.bytes},
                    "mean_bits": found.bits,
                    "predicted": found.predicted,
                    "measured": found.measured,
                    "rules": found.recipe.content()["rules"],
                    "uniform": before[bits][task],
                    "allocated": scored(found.recipe, [task])[task],
                }
            )
    computed = torch.cuda.get_device_name(there) if there.type == "cuda" else "cpu"
    return {**asdict(row), "results": results, "device": computed, "seconds": round(time.process_time() - begun, 1)}


def _kept(values: np.ndarray) -> str:
    return b64encode(zlib.compress(values.astype(np.float32).tobytes(), 9)).decode()


def _values(kept: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(b64decode(kept)), np.float32).astype(np.float64)


def report() -> list[dict[str, Any]]:
    """Of every checkpoint, variant, method, task and budget that was measured: both recipes, and the difference."""
    found: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in json_lines.read(MEASURED):
        for result in row["results"]:
            key = (row["checkpoint"], row["variant"], row["method"], result["task"], result["bits"])
            found.setdefault(key, {})[row["seed"]] = result
    return [_summary(key, seeds) for key, seeds in sorted(found.items())]


def _summary(key: tuple[Any, ...], seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    checkpoint, variant, method, task, bits = key
    means = {
        name: [np.mean([_values(result[name][part]) for result in seeds.values()], 0) for part in (0, 1)]
        for name in ("uniform", "allocated")
    }
    metric, unit = SCORE[task]
    summary: dict[str, Any] = {
        "model": checkpoint,
        "variant": variant,
        "method": method,
        "task": task,
        "uniform_bits": bits,
        "calibration_seeds": sorted(seeds),
        "bytes": {name: [result["bytes"][name] for _, result in sorted(seeds.items())] for name in means},
        "mean_bits": [result["mean_bits"] for _, result in sorted(seeds.items())],
    }
    for number, (name, scale) in enumerate(((metric, unit), ("divergence", 0.01))):
        pair = [scale * means[which][number] for which in ("uniform", "allocated")]
        pictures = range(len(pair[0]))
        difference = paired_difference(*pair, pictures)  # type: ignore[arg-type]
        gain = difference if name == metric else paired_difference(*reversed(pair), pictures)  # type: ignore[arg-type]
        shown = 100 if name == "accuracy" else 1
        summary[name] = {
            **{which: shown * float(values[number].mean()) for which, values in means.items()},
            "allocated - uniform": [difference.points, difference.low, difference.high],
            "said": in_words(gain),
        }
    return summary


def run(wanted: Sequence[Row], workers: int, device: str) -> bool:
    """Measure rows, and keep each as it is done; False where any failed, with the traceback said."""
    good = True
    for name in {row.checkpoint for row in wanted if row.variant != "plain"}:
        methods.make_variant(name, "outliers", 0)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(measure, row, device): row for row in wanted}
        for done, future in enumerate(as_completed(futures), start=1):
            try:
                kept = future.result()
            except Exception:  # another row may well work; this one is left for the next run
                good = False
                traceback.print_exc()
                continue
            json_lines.append(MEASURED, {**kept, "revision": common.revision()})
            print(f"{done}/{len(wanted)}: {futures[future]}, {kept['seconds']} processor seconds", flush=True)
    return good


def in_lines(summaries: Sequence[dict[str, Any]]) -> Iterator[str]:
    for one in summaries:
        metric, _ = SCORE[one["task"]]
        said = [
            f"{name} {one[name]['uniform']:.4g} -> {one[name]['allocated']:.4g} "
            "({:+.2g}, 95 %: {:+.2g} to {:+.2g}; ".format(*one[name]["allocated - uniform"])
            + f"{one[name]['said']})"
            for name in (metric, "divergence")
        ]
        head = (one["model"], one["variant"], one["method"], f"{one['uniform_bits']} bits", one["task"])
        yield f"{' '.join(head)}, {len(one['calibration_seeds'])} seeds: {'; '.join(said)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="rows whose name this finds")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--list", action="store_true", help="name the rows that are left, and end")
    options = parser.parse_args()
    measured = {(one["checkpoint"], one["variant"], one["method"], one["seed"]) for one in json_lines.read(MEASURED)}
    wanted = [
        row
        for row in rows()
        if options.only.search(str(row)) and (row.checkpoint, row.variant, row.method, row.seed) not in measured
    ]
    if options.list:
        print(*wanted, sep="\n")
        return
    good = options.report or run(wanted, options.workers, options.device)
    summaries = report()
    print(*in_lines(summaries), sep="\n")
    print(common.write("allocation", "python benchmarks/allocation.py", summaries))
    if not good:
        sys.exit("some rows failed; run again to try them anew")


if __name__ == "__main__":
    main()
