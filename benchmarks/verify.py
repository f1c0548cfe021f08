"""What the check itself takes: seconds and memory of `vlmq verify`, by part, for both demos.

    python benchmarks/verify.py

An AWQ export of 4 bits in both formats, verified on all evaluation questions: first with its reference measured, then
with that taken from a cache. Memory is that of this process and of every process below it, sampled while it runs: with
one model at a time the whole is far from the sum of what the models' processes take. Last, the audit alone.
"""

import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import psutil

from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.evaluation.verify import audited

FLAGS = ("--method", "awq", "--bits", "4", "--group-size", "64", "--no-verify")
EVERY = 0.05  # seconds


def vlmq(*arguments: object) -> dict:
    """Run the command line; exit code, seconds, and the highest resident bytes: of all its processes, and of one."""
    command = [sys.executable, "-m", "vlmq.cli", *map(str, arguments)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = {"all": 0, "one": 0, "processes": 0}
    watched = threading.Thread(target=_watch, args=(psutil.Process(process.pid), peaks))
    watched.start()
    code = process.wait()
    watched.join()
    return {"exit_code": code, "seconds": time.perf_counter() - start, "peak": peaks}


def _watch(process: psutil.Process, peaks: dict[str, int]) -> None:
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        sizes = []
        for each in [process, *_below(process)]:
            try:
                sizes.append(each.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        found = {"all": sum(sizes), "one": max(sizes, default=0), "processes": len(sizes)}
        peaks.update({name: max(peaks[name], size) for name, size in found.items()})
        time.sleep(EVERY)


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def main() -> None:
    results = {}
    with TemporaryDirectory() as work:
        for name, reference in CHECKPOINTS.items():
            folder, cache = Path(work) / name, Path(work) / "cache"
            vlmq("export", name, *FLAGS, "-o", folder)
            found = {
                "verify": vlmq("verify", folder, "--cache", cache),
                "verify, reference known": vlmq("verify", folder, "--cache", cache),
            }
            start = time.perf_counter()
            audited(folder, reference)
            found["audit"] = {"seconds": time.perf_counter() - start}
            results[name] = found
            print(name, found)
    print(common.write("verify", "python benchmarks/verify.py", results))


if __name__ == "__main__":
    main()
