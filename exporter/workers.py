"""Workers: the processes that calibrate one export together, each on some of the batches; torchrun starts them.

What they find adds up (`statistics.py`), so that all of them solve every block alike, and the first (rank 0) alone
writes. Without torchrun's environment there is one worker, and everything here leaves its argument as it is.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from vlmq.exporter.errors import VlmqError

PATIENCE = timedelta(days=1)  # while the first downloads or writes; a worker that ends is noticed at once


@contextmanager
def together() -> Iterator[None]:
    """Meet the other workers. All but the first wait here until it calls `admit`, or fails."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        if rank():
            wait()
        yield
    finally:
        dist.destroy_process_group()


def admit() -> None:
    """The first lets the others begin: what it refused until now, it refused alone."""
    if not rank():
        wait()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of the workers this one is; 0: the first, or the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_mine(batch: int) -> bool:
    """Whether this worker runs the batch of that index."""
    return batch % count() == rank()


def total(value: Tensor) -> Tensor:
    """The sum over workers, in place; the same bits on all of them."""
    return _reduced(value, dist.ReduceOp.SUM)


def least(value: Tensor) -> Tensor:
    """The elementwise minimum over workers, in place."""
    return _reduced(value, dist.ReduceOp.MIN)


def most(value: Tensor) -> Tensor:
    """The elementwise maximum over workers, in place."""
    return _reduced(value, dist.ReduceOp.MAX)


def number(value: float) -> float:
    """The sum over workers of one number."""
    return value if count() == 1 else total(torch.tensor(value, dtype=torch.float64)).item()


def wait() -> None:
    """Until all workers are here."""
    number(0)


def joined(rows: Tensor) -> Tensor:
    """The rows (k, ...) of all workers, in their order; k may differ."""
    if count() == 1:
        return rows
    lengths = torch.zeros(count(), dtype=torch.int64)
    lengths[rank()] = len(rows)
    start, stop = total(lengths)[: rank()].sum(), lengths[: rank() + 1].sum()
    every = rows.new_zeros(int(lengths.sum()), *rows.shape[1:])
    every[start:stop] = rows
    return total(every)


def united(names: Mapping[str, str]) -> dict[str, str]:
    """The entries of all workers' mappings, whose keys differ."""
    line = torch.frombuffer(bytearray(f"{json.dumps(dict(names))}\n", "utf-8"), dtype=torch.uint8)
    lines = bytes(joined(line).tolist()).decode().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


def _reduced(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if count() > 1:
        try:
            dist.all_reduce(value, operation)
        except RuntimeError as error:
            raise VlmqError(
                f"worker {rank()}: another worker has ended ({error}); see what it said, and start them all again"
            ) from error
    return value
