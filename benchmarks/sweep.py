"""What a sweep costs against as many exports and evaluations, and that it gives the same rows wherever it runs.

    python benchmarks/sweep.py [--cost] [--engines] [--bits 2 3 4 5 6 8 16] [--questions 2000] [--workers 2]

cost: `vlmq sweep` of blip2-mini by AWQ over all assignments of --bits to its components (343 by default) against
one `vlmq export` and the same score of what it wrote, times as many. The score is taken twice: as the sweep takes it,
in a process of its own, and by `vlmq evaluate`. Everything runs as a command, on one thread a process; processor
seconds of a command and its workers are compared, wall seconds are there beside them.
engines: a sweep of eight configurations in one process, in two, and on Ray with two workers: the seconds, and whether
scores and tables are equal to the byte.
Without either, both. Writes results/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import yaml

MODEL, GROUP = "blip2-mini", 64
FEW = [3, 16]  # bits of the sweep that every engine runs
TABLES = ("scores.csv", "rows.json")
HOME = Path(__file__).resolve().parent

# The score of one checkpoint as a sweep takes it, and the reference's that the divergence is from.
SCORE = """
import json, sys, torch
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.data import evaluation_set
from vlmq.exporter.load import load
from vlmq.exporter.search.tasks import ask, asked_of
torch.set_num_threads(1)
reference, folder, questions = sys.argv[1:]
checkpoint = open_checkpoint(reference)
samples = asked_of("vqa", evaluation_set("demo").samples)[: int(questions)]
print(json.dumps(ask("vqa", checkpoint, checkpoint.model(), samples).score(load(folder))))
"""


@dataclass(frozen=True)
class Spent:
    wall: float
    processor: float  # of the command and all that it started


def command(*arguments: object) -> tuple[Spent, str]:
    """Run a command of this Python, on one thread; its output. CalledProcessError where it fails."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(time.perf_counter() - begun, processor), done.stdout


def swept(
    folder: Path, bits: Sequence[int], options: argparse.Namespace, *more: object
) -> tuple[Spent, dict[str, Any]]:
    grid = folder.with_suffix(".yaml")
    grid.write_text(yaml.safe_dump({"recipe": {"method": "awq", "group_size": GROUP}, "each": {"bits": list(bits)}}))
    flags = ("--grid", grid, "--out", folder, "--samples", options.samples, "--questions", options.questions, "--json")
    spent, said = command("-m", "vlmq", "sweep", MODEL, *flags, *more)
    return spent, json.loads(said)


def cost(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Of the sweep, and of one export with each kind of score."""
    sweep, done = swept(work / "sweep", options.bits, options, "--workers", options.workers)
    count, out = len(done["rows"]), work / "out"
    flags = ("--method", "awq", "--bits", 4, "--group-size", GROUP, "--samples", options.samples)
    export, _ = command("-m", "vlmq", "export", MODEL, *flags, "--format", "safetensors", "--no-verify", "-o", out)
    score, _ = command("-c", SCORE, MODEL, out, options.questions)
    asked = ("--task", "vqav2", "--data", "demo", "--limit", options.questions, "--out", work / "answers.jsonl")
    evaluate, _ = command("-m", "vlmq", "evaluate", out, *asked)
    return {
        "rows": count,
        "distinct": done["distinct"],
        "pieces": done["pieces"],
        "workers": options.workers,
        "questions": options.questions,
        "sweep": asdict(sweep),
        "one": {"export": asdict(export), "score": asdict(score), "vlmq evaluate": asdict(evaluate)},
        "share of as many exports and scores": sweep.processor / count / (export.processor + score.processor),
        "share of as many vlmq export and vlmq evaluate": sweep.processor
        / count
        / (export.processor + evaluate.processor),
    }


def engines(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The same small sweep everywhere; AssertionError where any gives other tables."""
    found: dict[str, Any] = {}
    tables: dict[str, list[bytes]] = {}
    for name, flags in (
        ("one process", ("--workers", 1)),
        ("two processes", ("--workers", 2)),
        ("ray, two workers", ("--workers", 2, "--engine", "ray")),
    ):
        folder = work / name.replace(", ", "-").replace(" ", "-")
        spent, done = swept(folder, FEW, options, *flags)
        tables[name] = [(folder / file).read_bytes() for file in TABLES]
        found[name] = {"rows": len(done["rows"]), "wall": spent.wall}
    assert len({tuple(each) for each in tables.values()}) == 1, "rows that differ"
    return {**found, "tables equal to the byte": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--engines", action="store_true")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8, 16])
    parser.add_argument("--questions", type=int, default=common.SOME)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    both = not (options.cost or options.engines)
    before = common.RESULTS / "sweep.json"  # of which the part that is not run stays
    results: dict[str, Any] = json.loads(before.read_text())["results"] if before.exists() else {}
    with TemporaryDirectory() as work:
        if options.cost or both:
            results["cost"] = {"revision": common.revision(), **cost(options, Path(work))}
        if options.engines or both:
            results["engines"] = {"revision": common.revision(), **engines(options, Path(work))}
    print(json.dumps(results, indent=1))
    print(common.write("sweep", " ".join(["python", "benchmarks/sweep.py", *sys.argv[1:]]), results))


if __name__ == "__main__":
    main()
