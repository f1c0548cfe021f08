"""Where the tasks of a sweep run: in this process, in several of one thread each, or on a Ray cluster. With GPUs each
worker has one, as far as there are.

All give the same outcomes, in the order in which they are ready. A task that fails is an outcome too: the message.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import Any, Literal, TypeVar

import torch

from vlmq.exporter.errors import VlmqError

EngineName = Literal["process", "ray"]
Task = TypeVar("Task")
Outcome = dict[str, Any]  # what the work returned, or `failed` with a message
Work = Callable[[Task], Outcome]  # can be pickled
Each = Callable[[Sequence[Task]], Iterator[tuple[Task, Outcome]]]


def engine(
    name: EngineName, work: Work[Task], workers: int, address: str | None = None, gpu: bool = False
) -> AbstractContextManager[Each[Task]]:
    """A context that gives a function from tasks to their outcomes; of what `refuse` lets pass. gpu: each takes one."""
    if name == "ray":
        return _ray(work, workers, address, gpu)
    return _inline(work) if workers == 1 else _processes(work, workers)


def refuse(name: EngineName, workers: int, address: str | None) -> None:
    """VlmqError for an engine that cannot be."""
    if workers < 1:
        raise VlmqError(f"--workers {workers}: at least one is needed")
    if address and name != "ray":
        raise VlmqError(f"--ray-address {address}: no use without --engine ray; add it")
    if name == "ray":
        _import_ray()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise VlmqError(f"--engine ray: not installed ({error}); run `pip install 'vlmq[ray]'`") from error
    return ray


def attempt(work: Work[Task], task: Task) -> Outcome:
    try:
        return work(task)
    except Exception as error:  # another may well work; what went wrong is kept beside what did not
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}


@contextmanager
def _inline(work: Work[Task]) -> Iterator[Each[Task]]:
    yield lambda tasks: ((task, attempt(work, task)) for task in tasks)


@contextmanager
def _processes(work: Work[Task], workers: int) -> Iterator[Each[Task]]:
    context = get_context("spawn")
    ranks = context.SimpleQueue()
    for rank in range(workers):
        ranks.put(str(rank))
    with ProcessPoolExecutor(workers, context, _one_of, (ranks,)) as pool:

        def each(tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
            futures = {pool.submit(attempt, work, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise VlmqError(
                    "sweep: a worker was ended, often for lack of memory; the same command goes on from here, "
                    "with fewer --workers if need be"
                ) from error

        try:
            yield each
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _one_of(ranks: "SimpleQueue[str]") -> None:
    """Begin a worker: one thread, and of several GPUs its own (`devices.py`)."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = ranks.get()


@contextmanager
def _ray(work: Work[Task], workers: int, address: str | None, gpu: bool) -> Iterator[Each[Task]]:
    """Each task takes one core, and a GPU where one is wanted, the only one that it sees; Ray decides where it runs.

    Without an address a cluster of `workers` cores is started here, and ends with the sweep.
    """
    ray = _import_ray()
    options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise VlmqError(f"--ray-address {address}: no cluster there ({error}); start one with `ray start`") from error
    try:
        # A worker that dies takes its task with it: the sweep retries, and counts, by itself.
        remote: Any = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=0)(_one_thread)

        def each(tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
            shared = ray.put(work)
            pending = {remote.remote(shared, task): task for task in tasks}
            while pending:
                (ready,), _ = ray.wait(list(pending), num_returns=1)
                try:
                    outcome = ray.get(ready)
                except ray.exceptions.RayError as error:
                    outcome = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
                yield pending.pop(ready), outcome

        yield each
    finally:
        ray.shutdown()


def _one_thread(work: Work[Task], task: Task) -> Outcome:
    torch.set_num_threads(1)
    return attempt(work, task)
