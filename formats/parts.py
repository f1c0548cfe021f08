"""The named tensors that stand for one weight, checked against the dtype and shape they must have."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vlmq.formats.errors import FormatError
from vlmq.kernels.grid import Grid

Parts = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]  # dtype (None: the source's) and shape of each


def take(name: str, part: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """`name.part`; FormatError where it is absent."""
    try:
        return tensors[f"{name}.{part}"]
    except KeyError:
        raise FormatError(f"{name}.{part}: absent; export the model again") from None


def check(name: str, tensors: Mapping[str, Tensor], expected: Parts, shape: tuple[int, ...], grid: Grid) -> None:
    """FormatError for the first part that is absent, or not as a weight of `shape` on `grid` has it."""
    for part, (dtype, size) in expected.items():
        found = take(name, part, tensors)
        if tuple(found.shape) != size or (dtype is not None and found.dtype != dtype):
            raise FormatError(
                f"{name}.{part}: {_say(found.dtype, found.shape)} where a {grid.bits}-bit weight {tuple(shape)} "
                f"has {_say(dtype or found.dtype, size)}; export the model again"
            )


def _say(dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
