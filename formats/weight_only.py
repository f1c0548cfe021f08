"""What the layouts of AWQ and GPTQ share: weights alone, stored (in, out), with scales in float16."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmq.formats import parts
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.errors import FormatError
from vlmq.kernels.grid import ROW

GROUPS = (ROW, 16, 32, 64, 128)  # what gptqmodel's kernels take; vLLM's take all of these but 16


def size(name: str, part: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """The shape of the words of codes; FormatError where they are absent, or are no matrix."""
    shape = tuple(parts.take(name, part, tensors).shape)
    if len(shape) != 2:
        raise FormatError(f"{name}.{part}: {len(shape)} dimensions where words have 2; export the model again")
    return shape


def refuse(layout: str, bits: tuple[int, ...], name: str, grids: Grids) -> None:
    """FormatError where `layout`, which has so many `bits`, cannot hold a linear on such grids."""
    weight = grids.weight.stored
    if grids.inputs is not None:
        raise FormatError(f"{name}: {layout} rounds no inputs; choose compressed-tensors")
    if weight.bits not in bits:
        raise FormatError(
            f"{name}: {weight.bits} bits, {layout} has {', '.join(map(str, bits))}; choose compressed-tensors"
        )
    if weight.group not in GROUPS:
        raise FormatError(
            f"{name}: groups of {weight.group} columns, readers of {layout} take 16, 32, 64, 128 or a row; "
            "choose compressed-tensors"
        )


def refuse_shape(layout: str, name: str, what: str, count: int, multiple: int) -> None:
    """FormatError where so many rows or columns do not fill words of 32 bits."""
    if count % multiple:
        raise FormatError(f"{name}: {count} {what}, {layout} needs a multiple of {multiple}; choose compressed-tensors")


def float16(layout: str, name: str, scale: Tensor) -> Tensor:
    """Scales (out, groups) as (groups, out) in float16; FormatError where that would change a value."""
    stored = scale.to(torch.float16)
    if not torch.equal(stored.double(), scale.double()):
        dtype = str(scale.dtype).removeprefix("torch.")
        raise FormatError(
            f"{name}: {layout} stores scales in float16, which does not hold these {dtype} ones exactly; "
            "choose compressed-tensors, or export from a float16 checkpoint"
        )
    return stored.T.contiguous()
