"""Figures 3, 4, 5 and 7 of paper 002, of the demos: sweeps, allocated recipes among them, and what scores hang on.

    python benchmarks/figures.py [--models blip2-mini llava-mini] [--tasks vqa captions] [--questions 1000]
                                 [--workers 2] [--work FOLDER] [--grids components uniform]

Of each model and task: `vlmq sweep` over the grids of `grids/`, where recipes that `vlmq allocate` found for several
budgets, and round-to-nearest with one width for all, join the first; then `vlmq importance` on its tables. The folder
keeps all of it, pictures too, and the same command goes on where it was stopped. Writes results/figures.json: the rows
and the shares; and docs/pareto-MODEL.png, of the first task.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import common
import torch
import yaml

from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.search import allocate, sweep
from vlmq.exporter.search.importance import analyse
from vlmq.exporter.search.tasks import TASKS

HOME = Path(__file__).resolve().parent
GRIDS = {name: HOME / "grids" / f"{name}.yaml" for name in ("components", "uniform")}
METHODS = ("awq", "gptq")
BUDGETS = ("2.3bpw", "2.6bpw", "3bpw", "3.3bpw", "3.8bpw", "4.3bpw", "5.3bpw")  # 4.3: 4 bits with scales and zeros
WIDTHS = (2, 3, 4, 5, 6, 8)
GROUP = 64


def said(what: str, done: int, of: int) -> None:
    print(f"{what} {done}/{of}", end="\r", flush=True)


def recipes(model: str, task: str, folder: Path) -> dict[str, list[str]]:
    """Series -> files, as a grid has them: allocated ones by method, and one width for all by round-to-nearest."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[str]] = {"rtn, one width": []}
    for bits in WIDTHS:
        content = {"method": "rtn", "bits": bits, "group_size": GROUP}
        found["rtn, one width"].append(_written(folder / f"rtn-{bits}.yaml", content))
    for method in METHODS:
        files = [folder / f"{method}-{budget}.yaml" for budget in BUDGETS]
        if not all(file.exists() for file in files):
            request = allocate.Request(model, "", make_recipe({"method": method, "group_size": GROUP}), task)
            for file, made in zip(files, allocate.allocations(request, BUDGETS, said), strict=True):
                _written(file, made.recipe.content())
        found[f"{method}, allocated"] = [str(file) for file in files]
    return found


def _written(file: Path, content: dict[str, Any]) -> str:
    part = file.with_suffix(".part")
    part.write_text(yaml.safe_dump(content, sort_keys=False))
    part.rename(file)
    return str(file)


def swept(model: str, task: str, grid: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The rows of a grid, and the shares that importance finds in its tables."""
    content = yaml.safe_load(GRIDS[grid].read_text())
    if grid == "components":
        content["recipes"] = recipes(model, task, folder / "recipes")
    file = Path(_written(folder / f"{grid}.yaml", content))
    request = sweep.Request(model, file, folder / grid, task, questions=options.questions, workers=options.workers)
    done = sweep.sweep(request, said)
    if done.failures:
        raise SystemExit(f"{model}, {task}, {grid}: {done.failures}; run again to try them anew")
    results: dict[str, Any] = {
        "model": model,
        "task": task,
        "grid": grid,
        "distinct": done.distinct,
        "pieces": done.pieces,
        "rows": [[row.series, row.name, row.bits, row.bytes, row.scores] for row in done.rows],
    }
    if grid == "components":
        tables = [folder / grid / f"scores-{method}.csv" for method in METHODS]
        target = TASKS[task].evaluated.metric
        for name in (target, "divergence"):
            output = folder / f"importance-{name}"
            shares = analyse(tables, name, None if output.exists() else output, 0, said)
            results[f"importance, {name}"] = [{**asdict(table), "file": Path(table.file).name} for table in shares]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["blip2-mini", "llava-mini"])
    parser.add_argument("--tasks", nargs="+", default=["vqa", "captions"])
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(gettempdir()) / "vlmq-figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for model in options.models:
        for task in options.tasks:
            for grid in options.grids:
                folder = options.work / f"{model}-{task}"
                folder.mkdir(parents=True, exist_ok=True)
                results.append(swept(model, task, grid, folder, options))
                print(f"{model}, {task}, {grid}: {len(results[-1]['rows'])} rows in {folder / grid}")
    if "components" in options.grids:
        for model in options.models:
            picture = options.work / f"{model}-{options.tasks[0]}" / "components" / "pareto.png"
            shutil.copy(picture, HOME.parent / "docs" / f"pareto-{model}.png")
    print(common.write("figures", " ".join(["python", "benchmarks/figures.py", *sys.argv[1:]]), results))


if __name__ == "__main__":
    main()
