"""What the check itself takes: seconds and memory of `vlmq verify`, by part.

    python benchmarks/verify.py [--questions N]

AWQ exports of both demos, 4 bits in both formats, verified on all evaluation questions: first with the reference
measured, then with that taken from a cache; and the audit alone. The demos' weights are lost in the memory of the
libraries, so a random BLIP-2 of a quarter of the true shape is verified too, rounded to nearest, on a few pictures: its
reference takes hundreds of megabytes. Memory is that of the command and of the one process below it that runs a model,
looked at while they run; pages that both share count twice. With --questions so many are asked, for a try, and
nothing is written.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import scale

GRID = ("--bits", "4", "--group-size", "64", "--no-verify", "--no-gate")
LARGE = ("blip2-opt-2.7b", 0.25)  # shape, and how much of it
PICTURES = 8
EVERY = 0.05  # seconds
WORKER = "vlmq.exporter.evaluation.worker"


def vlmq(*arguments: object) -> dict:
    """Run the command line: exit code, seconds, processor seconds, and the highest resident bytes.

    all: of the command and the workers that run a model together; command: its own; worker: the largest of the others.
    """
    command = [sys.executable, "-m", "vlmq.cli", *map(str, arguments)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks, used = {"all": 0, "command": 0, "worker": 0, "workers_at_once": 0}, {}
    watched = threading.Thread(target=_watch, args=(process, peaks, used))
    watched.start()
    said = process.communicate()[1]
    watched.join()
    if process.returncode not in (0, 1):
        sys.exit(f"verify: {' '.join(command)} ended with {process.returncode}: {said[-2000:]}")
    seconds = {"seconds": time.perf_counter() - start, "processor_seconds": sum(used.values())}
    return {"exit_code": process.returncode, **seconds, "peak": peaks}


def _watch(process: subprocess.Popen, peaks: dict[str, int], used: dict[int, float]) -> None:
    """Look at the process and its workers until it has ended. used: processor seconds by process."""
    first = psutil.Process(process.pid)
    while process.poll() is None:
        sizes = {each: _size(each, used) for each in [first, *_workers(first)]}
        workers = [size for each, size in sizes.items() if each != first and size]
        found = {
            "all": sum(sizes.values()),
            "command": sizes[first],
            "worker": max(workers, default=0),
            "workers_at_once": len(workers),
        }
        peaks.update({name: max(peaks[name], size) for name, size in found.items()})
        time.sleep(EVERY)


def _size(process: psutil.Process, used: dict[int, float]) -> int:
    """Resident bytes; 0 of one that has ended meanwhile."""
    try:
        with process.oneshot():
            times = process.cpu_times()
            used[process.pid] = times.user + times.system
            return process.memory_info().rss
    except psutil.Error:
        return 0


def _workers(process: psutil.Process) -> list[psutil.Process]:
    """Those that run a model; not one that is about to be and still has the command's own pages."""
    try:
        return [each for each in process.children(recursive=True) if WORKER in each.cmdline()]
    except psutil.Error:
        return []


def measured(folder: Path, *arguments: object) -> dict:
    """`vlmq verify`, and what each of the two models takes by itself."""
    found = vlmq("verify", folder, "--no-gate", *arguments)
    report = json.loads((folder / "report.json").read_text())
    sides = [("reference", report["reference"]), *(("export", side) for side in (report["export"], *report["others"]))]
    found["models"] = {
        f"{which}, {side['engine']}": side["memory"]["loaded"] - side["memory"]["imported"] for which, side in sides
    }
    return found


def demo(name: str, reference: Path, work: Path, questions: int | None) -> dict:
    folder, cache = work / f"{name}-awq", work / "cache"
    vlmq("export", name, "--method", "awq", *GRID, "-o", folder)
    data = () if questions is None else ("--data", _few(work, questions))
    found = {
        "verify": measured(folder, "--cache", cache, *data),
        "verify, reference known": measured(folder, "--cache", cache, *data),
    }
    from vlmq.exporter.evaluation.verify import audited

    start, used = time.perf_counter(), time.process_time()
    audited(folder, reference)
    found["audit"] = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - used,
    }
    return found


def _few(work: Path, count: int) -> Path:
    """The first of the demo's questions, as a file."""
    import common

    file = work / "questions.jsonl"
    lines = [
        {
            "id": sample.id,
            "image": str(sample.image),
            "question": sample.text,
            "answers": sample.answers,
            "answer_type": sample.answer_type,
        }
        for sample in common.questions()[:count]
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def large(work: Path) -> dict:
    """A model whose weights show beside the libraries; its answers mean nothing, so the exit code does neither."""
    checkpoints = Path(tempfile.gettempdir()) / "vlmq-scale"
    checkpoints.mkdir(exist_ok=True)
    source = scale.checkpoint(*LARGE, None, checkpoints)
    folder = work / source.name
    vlmq("export", source, "--method", "rtn", *GRID, "--format", "safetensors", "-o", folder)
    return {"verify": measured(folder, "--data", scale.pictures(PICTURES, work))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--questions", type=int, help="ask so many, and write nothing")
    questions = parser.parse_args().questions
    from vlmq.exporter.demo.catalog import CHECKPOINTS

    results = {}
    with TemporaryDirectory() as place:
        work = Path(place)
        results[f"{LARGE[0]} x {LARGE[1]}"] = large(work)
        for name, reference in CHECKPOINTS.items():
            results[name] = demo(name, reference, work, questions)
        for name, found in results.items():
            print(name, json.dumps(found), flush=True)
    if questions is None:
        import common

        print(common.write("verify", "python benchmarks/verify.py", results))


if __name__ == "__main__":
    main()
