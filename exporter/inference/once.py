"""A batch's questions about one picture: the vision encoder, most of what a short answer costs, sees it once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn


def distinct(images: Sequence["Image"]) -> tuple[list[int], list[int]]:
    """Where each image object comes first, and for every position which of those places shows its image."""
    first: dict[int, int] = {}
    for place, image in enumerate(images):
        first.setdefault(id(image), place)
    rank = {image: number for number, image in enumerate(first)}
    return list(first.values()), [rank[id(image)] for image in images]


@contextmanager
def seen_once(tower: "nn.Module", images: Sequence["Image"]) -> Iterator[None]:
    """Meanwhile a transformers vision encoder that is shown the batch's pixels (n, ...) sees each image once.

    What it gives, tensors (n, ...) in whatever holds them, is the same for equal images as if it had seen them all.
    """
    first, which = distinct(images)
    if len(first) == len(which):
        yield
        return
    forward = tower.forward

    def once(pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
        return _picked(forward(pixel_values[first], *args, **kwargs), which)

    with instead(tower, once):
        yield


@contextmanager
def instead(module: "nn.Module", forward: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile a module has another forward; its hooks run as ever."""
    module.forward = forward  # of this module alone, not of its class
    try:
        yield
    finally:
        del module.forward


def _picked(output: Any, which: list[int]) -> Any:
    if output is None:
        return None
    if isinstance(output, dict):  # transformers' outputs are such
        return type(output)(**{name: _picked(value, which) for name, value in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(_picked(value, which) for value in output)
    return output[which]
