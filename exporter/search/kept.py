"""What is kept of what was computed, as far as a number of bytes goes: what was used longest ago goes first."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from torch import Tensor

GIBIBYTE = 1 << 30
Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values by key. What alone is larger than `limit` bytes is never kept."""

    def __init__(self, size: Callable[[Value], int], limit: int = GIBIBYTE) -> None:
        self.size, self.limit = size, limit
        self.values: OrderedDict[str, Value] = OrderedDict()

    def get(self, key: str | None, make: Callable[[], Value]) -> Value:
        """The value of a key, made where it is not there. key None: of nothing that could come again."""
        if key is not None and key in self.values:
            self.values.move_to_end(key)
            return self.values[key]
        made = make()
        if key is not None:
            self.values[key] = made
            self.trim()
        return made

    def trim(self) -> None:
        """To be called where a value has grown."""
        while sum(map(self.size, self.values.values())) > self.limit:
            self.values.popitem(last=False)


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
