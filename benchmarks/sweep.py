"""What a sweep costs against as many exports, and what allocated bits bring against uniform ones of equal bytes.

    python benchmarks/sweep.py [--cost] [--allocation] [--bits 2 16] [--questions 2000] [--samples 128] [--workers 1]

cost: the AWQ sweep of blip2-mini over all assignments of --bits to its components (343 by default) against one export
with its evaluation, times as many. allocation: at the bytes of uniform 3 and 4 bits, GPTQ and AWQ, on both demos: the
allocated recipe against the uniform one on the same questions, both quantized as an export quantizes them.
Without either, both. Writes results/sweep.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import numpy as np
import torch
import yaml

from vlmq.exporter.calibration import prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.data import demo_folder
from vlmq.exporter.evaluation.answers import answer_all
from vlmq.exporter.evaluation.statistics import paired_difference
from vlmq.exporter.pipeline import Request as Export
from vlmq.exporter.pipeline import export
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.runtime import open_vlm
from vlmq.exporter.samples import Sample
from vlmq.exporter.search import allocate, sweep
from vlmq.exporter.search.grid import Configuration
from vlmq.exporter.search.packed import Scorer
from vlmq.exporter.search.pieces import plan
from vlmq.exporter.simulate import simulate_batches
from vlmq.exporter.walk import walk

GROUP = 64
METHODS = ("awq", "gptq")
BUDGETS = (3, 4)  # bits of the uniform recipe whose bytes an allocated one may have
DEMOS = ("blip2-mini", "llava-mini")


def cost(options: argparse.Namespace) -> dict[str, Any]:
    """Wall seconds of the sweep, and of one export with its evaluation, all in this process.

    The export is the sweep's counterpart with the least to do: safetensors alone, one set of questions.
    """
    with TemporaryDirectory() as work:
        grid = Path(work) / "grid.yaml"
        grid.write_text(
            yaml.safe_dump({"recipe": {"method": "awq", "group_size": GROUP}, "each": {"bits": options.bits}})
        )
        request = sweep.Request(
            model="blip2-mini",
            grid=grid,
            output=Path(work) / "sweep",
            samples=options.samples,
            questions=options.questions,
            workers=options.workers,
        )
        begun = time.perf_counter()
        done = sweep.sweep(request, _said)
        swept = time.perf_counter() - begun
        recipe = make_recipe({"method": "awq", "bits": 4, "group_size": GROUP})
        asked = common.questions()[: options.questions]
        begun = time.perf_counter()
        made = export(
            Export(
                "blip2-mini", Path(work) / "out", recipe, formats="safetensors", samples=options.samples, verify=False
            )
        )
        exported = time.perf_counter() - begun
        assert made is not None
        begun = time.perf_counter()
        _evaluate(made.folder, asked)
        evaluated = time.perf_counter() - begun
    single = exported + evaluated
    return {
        "rows": len(done.rows),
        "distinct": done.distinct,
        "pieces": done.pieces,
        "workers": options.workers,
        "questions": len(asked),
        "sweep_seconds": swept,
        "export_seconds": exported,
        "evaluation_seconds": evaluated,
        "singles_seconds": single * len(done.rows),
        "share": swept / (single * len(done.rows)),
    }


def _evaluate(folder: Path, asked: Sequence[Sample]) -> None:
    """An export asked everything, as `vlmq verify` and `vlmq evaluate` ask one: prompts in batches."""
    answer_all(open_vlm(folder, "torch"), asked, open_checkpoint("blip2-mini").family)


def allocation(options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each demo, method and budget: both recipes' accuracy and divergence, and the paired difference."""
    found = []
    asked = common.questions()[: options.questions]
    for demo in DEMOS:
        checkpoint = open_checkpoint(demo)
        skeleton = checkpoint.skeleton()
        plain = walk(skeleton, checkpoint.family)
        scorer = Scorer(checkpoint, asked)
        reference = scorer.score(checkpoint.model())
        samples = common.calibration(options.samples, 0)
        batches = prepare(samples, common.processor_of(checkpoint.folder), checkpoint.family)
        for method in METHODS:
            for bits in BUDGETS:
                uniform = {"method": method, "bits": bits, "group_size": GROUP}
                allowed = plan(Configuration("uniform", method, uniform), checkpoint, skeleton, plain).bytes
                request = allocate.Request(
                    demo,
                    str(allowed),
                    make_recipe(uniform),
                    calibration=str(demo_folder("calibration")),
                    samples=options.samples,
                )
                begun = time.perf_counter()
                chosen = allocate.allocate(request, _said)
                seconds = time.perf_counter() - begun
                scores = {
                    name: scorer.score(simulate_batches(checkpoint, make_recipe(recipe), batches)[0])
                    for name, recipe in (("uniform", uniform), ("allocated", chosen.recipe.content()))
                }
                difference = paired_difference(
                    scores["uniform"].right, scores["allocated"].right, [sample.image for sample in asked]
                )
                found.append(
                    {
                        "model": demo,
                        "method": method,
                        "uniform_bits": bits,
                        "bytes": {"uniform": allowed, "allocated": chosen.bytes},
                        "mean_bits": chosen.bits,
                        "accuracy": {
                            name: 100 * float(score.right.mean())
                            for name, score in (("reference", reference), *scores.items())
                        },
                        "divergence": {
                            name: common.divergence(
                                reference.logits.astype(np.float64), score.logits.astype(np.float64)
                            )
                            for name, score in scores.items()
                        },
                        "allocated - uniform": asdict(difference),
                        "predicted": chosen.predicted,
                        "measured": chosen.measured,
                        "factors": chosen.factors,
                        "allocation_seconds": seconds,
                        "recipe": chosen.recipe.content()["rules"],
                    }
                )
                print(
                    f"{demo} {method} {bits}: {found[-1]['accuracy']}, {found[-1]['allocated - uniform']}", flush=True
                )
    return found


def _said(what: str, done: int, of: int) -> None:
    print(f"{what} {done}/{of}", end="\r", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--allocation", action="store_true")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8, 16])
    parser.add_argument("--questions", type=int, default=common.SOME)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    both = not (options.cost or options.allocation)
    results: dict[str, Any] = {"revision": common.revision()}
    if options.cost or both:
        results["cost"] = cost(options)
    if options.allocation or both:
        results["allocation"] = allocation(options)
    print(common.write("sweep", " ".join(["python", "benchmarks/sweep.py", *sys.argv[1:]]), results))


if __name__ == "__main__":
    main()
