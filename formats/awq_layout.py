"""AWQ's `gemm` layout: 4-bit weights that transformers (with gptqmodel), vLLM and SGLang read.

A quantized linear `name` with a weight (out, in) and G groups in a row has, in place of `name.weight`:

    name.qweight  int32 (in, out / 8)      codes of 8 rows of the weight in a word
    name.qzeros   int32 (G, out / 8)       zeros, packed likewise
    name.scales   float16 (G, out)

    weight = (codes - zero) * scale

Word c holds rows 8c to 8c + 7: of these, row ORDER[i] has bits 4i to 4i + 3. The layout is defined by the kernels of
AWQ (`awq/quantize/qmodule.py`, WQLinear; `gemm` in AutoAWQ). Symmetric weights have a zero of 8 everywhere, stored.
config.json describes one grid; what is not quantized is named there, and everything else is taken to be.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vlmq.formats import parts, weight_only
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.errors import FormatError
from vlmq.formats.parts import Parts
from vlmq.formats.targets import prefixes
from vlmq.kernels import words
from vlmq.kernels.grid import Grid, QuantizedWeight

NAME = "awq"
CONFIG = {"quant_method": "awq", "version": "gemm"}  # how config.json tells this layout
BITS = 4
IN_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # ORDER[PLACES[row]] == row
CODES, ZEROS, SCALES = "qweight", "qzeros", "scales"
PARTS = (CODES, ZEROS, SCALES)


def pack(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that stand for `name.weight`; layout above. FormatError where float16 changes a scale."""
    return {
        f"{name}.{CODES}": _pack(weight.codes),
        f"{name}.{ZEROS}": _pack(weight.zero),
        f"{name}.{SCALES}": weight_only.float16(NAME, name, weight.scale),
    }


def unpack(name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
    """The exact inverse of `pack`; FormatError where a tensor is absent, or not of the dtype and shape of `grid`."""
    columns, out_words = weight_only.size(name, CODES, tensors)
    shape = (out_words * IN_WORD, columns)
    parts.check(name, tensors, layout(shape, grid), shape, grid)
    codes, zero = _unpack(tensors[f"{name}.{CODES}"]), _unpack(tensors[f"{name}.{ZEROS}"])
    return QuantizedWeight(codes, tensors[f"{name}.{SCALES}"].T.contiguous(), zero, grid)


def _pack(values: Tensor) -> Tensor:
    """(out, n) uint8  ->  (n, out / 8) int32."""
    ordered = values.T.unflatten(1, (-1, IN_WORD))[..., ORDER].flatten(1)
    return words.pack(ordered, BITS, dim=1)


def _unpack(packed: Tensor) -> Tensor:
    """(n, out / 8) int32  ->  (out, n) uint8."""
    ordered = words.unpack(packed, BITS, packed.shape[1] * IN_WORD, dim=1)
    return ordered.unflatten(1, (-1, IN_WORD))[..., PLACES].flatten(1).T.contiguous()


def layout(shape: tuple[int, int], grid: Grid) -> Parts:
    """Dtype and shape of every part of a weight of `shape` on `grid`."""
    rows, columns = shape
    groups = columns // grid.width(columns)
    return {
        CODES: (torch.int32, (columns, rows // IN_WORD)),
        ZEROS: (torch.int32, (groups, rows // IN_WORD)),
        SCALES: (torch.float16, (groups, rows)),
    }


def refuse(name: str, shape: tuple[int, int], grids: Grids) -> None:
    """FormatError where this layout cannot hold a linear of `shape` on `grids`."""
    weight_only.refuse(NAME, (BITS,), name, grids)
    weight_only.refuse_shape(NAME, name, "rows", shape[0], IN_WORD)


def quantization_config(sites: Mapping[str, Grids], kept: Iterable[str], aliases: Mapping[str, Iterable[str]]) -> dict:
    """What config.json says under `quantization_config`.

    sites: the grids of every quantized linear; kept: the linears that are not; both by their names in memory. aliases:
    the other names of a linear that some reader goes by. transformers keeps what lies under a name in memory, vLLM
    whatever contains a name that is nearer to the files': so both are listed. FormatError for a second grid.
    """
    grids = {entry.weight.stored: name for name, entry in sites.items()}
    if len(grids) > 1:
        first, second = list(grids.values())[:2]
        raise FormatError(
            f"{second}: not on the grid of {first}, and {NAME} has one for the whole model; choose compressed-tensors"
        )
    (grid,) = grids
    return {
        **CONFIG,
        "bits": BITS,
        "group_size": grid.group,
        "zero_point": True,  # they are stored, whatever they are
        "sym": grid.symmetric,
        "modules_to_not_convert": prefixes(kept, sites, aliases),
    }


def grids(config: Mapping, names: Iterable[str]) -> dict[str, Grids]:
    """The grid of each of `names` (linears, by their names in memory) that a `quantization_config` quantizes."""
    grid = Grid(config["bits"], config["group_size"], config.get("sym", False))
    kept = config.get("modules_to_not_convert") or ()
    return {name: Grids(grid) for name in names if not any(part in name for part in kept)}
