"""Devices that are not the processor: a GPU, and one that computes on the processor but keeps its tensors apart as a
GPU does.

A tensor on that one says that it lies on DEVICE; whatever mixes it with one that lies here raises, as on a GPU. So the
code that takes a block to a GPU and back runs, and is held to the bits that the processor gives, where there is none.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("lazy", 0)  # one that torch has a name for but, as built here, no code
aten = torch.ops.aten
BETWEEN = (aten.copy_.default, aten.index.Tensor, aten.index_put_.default)  # indices may lie here


class Elsewhere(torch.Tensor):
    """A tensor whose values lie in `here`, and which says that they lie on DEVICE."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "Elsewhere":
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, here.size(), dtype=here.dtype, device=DEVICE, **layout)
        made.here = here
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Sees tensors that are made from nothing too."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """Tensors from numbers and back, which torch does below where `_Everywhere` looks."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") == DEVICE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if function is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].here.tolist()
        return function(*args, **kwargs)


@contextmanager
def a_device_elsewhere() -> Iterator[torch.device]:
    with _Everywhere(), _Numbers():
        yield DEVICE


def a_gpu() -> AbstractContextManager[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return nullcontext(torch.device("cuda", 0))


DEVICES = (a_device_elsewhere, a_gpu)


def _run(operation, args, kwargs):
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, Elsewhere)]
    mixed = [each for each in tensors if not isinstance(each, Elsewhere) and each.dim()]
    if there and mixed and operation not in BETWEEN:
        raise RuntimeError(f"{operation}: tensors of two devices")
    wanted = kwargs.get("device")
    own_args, own_kwargs = tree_map_only(Elsewhere, lambda each: each.here, (args, kwargs))
    if wanted == DEVICE:
        own_kwargs = {**own_kwargs, "device": torch.device("cpu")}
    found = operation(*own_args, **own_kwargs)
    if operation is aten.copy_.default:
        return args[0]
    if not (there if wanted is None else wanted == DEVICE):
        return found
    made = tree_map_only(torch.Tensor, Elsewhere, found)
    return return_and_correct_aliasing(operation, args, kwargs, made) if there else made
