"""What the demos answer before and after: accuracy on their questions, captions, seconds and memory.

    python benchmarks/evaluation.py [--limit N]

Each demo is exported twice at 4 bits in groups of 64, by AWQ and by rounding to nearest. Reference and exports are
asked all evaluation questions, read from VQAv2's official files, and for a caption of every picture, as `vlmq evaluate`
asks; the reference in PyTorch, the exports in onnxruntime. Seconds are those of all answers, scoring included; memory
and the time of one answer come from a process for each model that does nothing else. With --limit a few are asked, for
a try, and nothing is written.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import common

from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.evaluation.comparison import compare
from vlmq.exporter.evaluation.evaluate import Request, evaluate
from vlmq.exporter.evaluation.measure import measure
from vlmq.exporter.evaluation.records import Results
from vlmq.exporter.evaluation.summary import summarise
from vlmq.exporter.pipeline import Request as ExportRequest
from vlmq.exporter.pipeline import export
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.runtime import engine_of

METHODS = ("rtn", "awq")
GRID = {"bits": 4, "group_size": 64}
TASKS = {"questions": "vqav2", "captions": "coco"}
REFERENCE = "reference"

Made = TypeVar("Made")


def timed(work: Callable[[], Made]) -> tuple[Made, dict[str, float]]:
    """What it makes, and the seconds it takes: on the clock, and of this process's threads."""
    start, used = time.perf_counter(), time.process_time()
    made = work()
    return made, {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - used}


def exported(name: str, method: str, folder: Path) -> dict[str, float]:
    recipe = make_recipe({"method": method, **GRID})
    return timed(lambda: export(ExportRequest(name, folder, recipe, verify=False, gate=False)))[1]


def asked(model: str, task: str, out: Path, limit: int | None, reference: Results | None) -> tuple[Results, dict]:
    """Answers, and the figures of their table; compared with those of `reference` where there is one."""
    results, took = timed(lambda: evaluate(Request(model, task, "demo", out, limit=limit)))
    found = summarise(results)
    row = {
        "samples": len(results.answered),
        found.metric: {group.name: group.value for group in found.groups},
        **{metric.name: metric.note if metric.value is None else metric.value for metric in found.metrics},
        "empty": found.odd.empty,
        **took,
    }
    if reference:
        against = compare(results, reference)
        row["against"] = {change.name: asdict(change) for change in against.changes}
        row["same_answers"] = against.same_answer
    return results, row


def alone(folder: Path, work: Path) -> dict:
    """Memory, and the speed of one answer at a time, in a fresh process."""
    work.mkdir()
    found = measure(folder, engine_of(folder), common.questions(), work, probes=0, answer=False)
    return {
        "engine": found.engine,
        "threads": found.threads,
        "memory": {**asdict(found.memory), "model": found.memory.model},
        "seconds_per_answer": found.seconds_per_answer,
    }


def models_of(name: str, work: Path) -> tuple[dict[str, Path], dict[str, dict[str, float]]]:
    """The folders of the reference and of its exports, and what it took to make these."""
    made = {method: work / f"{name}-{method}" for method in METHODS}
    took = {method: exported(name, method, folder) for method, folder in made.items()}
    return {REFERENCE: CHECKPOINTS[name], **made}, took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--limit", type=int, help="ask so many questions and captions, and write nothing")
    limit = parser.parse_args().limit
    results = {}
    start = time.perf_counter()
    with TemporaryDirectory() as place:
        work = Path(place)
        for name in CHECKPOINTS:
            folders, took = models_of(name, work)
            known: dict[str, Results] = {}
            rows = results[name] = {}
            for label, folder in folders.items():
                row = rows[label] = alone(folder, work / f"{name}-{label}-alone")
                row["export"] = took.get(label)
                for kind, task in TASKS.items():
                    said, row[kind] = asked(
                        str(folder), task, work / f"{name}-{label}-{task}.jsonl", limit, known.get(kind)
                    )
                    known.setdefault(kind, said)
                print(name, label, row, flush=True)
    found = {"seconds": time.perf_counter() - start, "models": results}
    print(f"{found['seconds']:.0f} s in all")
    if limit is None:
        print(common.write("evaluation", "python benchmarks/evaluation.py", found))


if __name__ == "__main__":
    main()
