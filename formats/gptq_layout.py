"""GPTQ's layout, in its two versions: weights of 2, 3, 4 and 8 bits that vLLM, SGLang and gptqmodel read.

A quantized linear `name` with a weight (out, in), b bits and G groups in a row has, in place of `name.weight`:

    name.qweight  int32 (in * b / 32, out)     codes, packed down each column, lowest bits first
    name.qzeros   int32 (G, out * b / 32)      zeros (version 2) or zeros - 1 (version 1), packed along each row
    name.scales   float16 (G, out)
    name.g_idx    int32 (in,)                  the group of each column

    weight = (codes - zero) * scale

The layout is defined by AutoGPTQ (`nn_modules/qlinear`), its version 2 by gptqmodel (`checkpoint_format: gptq_v2`).
Readers of version 1 add 1 to what is stored and differ in what they make of an overflow, so a zero of 0 has no place
in it. Columns are in the order of the input whatever order they were solved in: `g_idx` counts up.

config.json describes the grid of most linears. Under `dynamic`, which transformers does not read, are the names of what
has another (`+:`) or none (`-:`), each a regex that is matched from the start.
"""

import math
import re
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

V1, V2 = "gptq", "gptq-v2"
CONFIGS = {  # how config.json tells a version
    V1: {"quant_method": "gptq", "checkpoint_format": "gptq"},
    V2: {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
}
OFFSETS = {V1: 1, V2: 0}  # what is taken from a zero before it is stored
BITS = (2, 3, 4, 8)
CODES, ZEROS, SCALES, GROUPS = "qweight", "qzeros", "scales", "g_idx"
PARTS = (CODES, ZEROS, SCALES, GROUPS)


def pack(version: str, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that stand for `name.weight`; layout above. FormatError where one of them cannot hold a value."""
    offset, bits = OFFSETS[version], weight.grid.bits
    if int(weight.zero.min()) < offset:
        raise FormatError(f"{name}: has a zero of 0, which {version} cannot store; choose {V2}")
    return {
        f"{name}.{CODES}": words.pack(weight.codes.T, bits, dim=0),
        f"{name}.{ZEROS}": words.pack(weight.zero.T - offset, bits, dim=1),
        f"{name}.{SCALES}": weight_only.float16(version, name, weight.scale),
        f"{name}.{GROUPS}": _groups(weight.shape[1], weight.grid),
    }


def unpack(version: str, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
    """The exact inverse of `pack`; FormatError where a tensor is absent, or not of the dtype and shape of `grid`."""
    in_words, rows = weight_only.size(name, CODES, tensors)
    columns = in_words * words.WORD // grid.bits
    parts.check(name, tensors, layout((rows, columns), grid), (rows, columns), grid)
    if not torch.equal(tensors[f"{name}.{GROUPS}"], _groups(columns, grid)):
        raise FormatError(f"{name}.{GROUPS}: columns are not in the order of the input; export the model again")
    codes = words.unpack(tensors[f"{name}.{CODES}"], grid.bits, columns, dim=0)
    zero = words.unpack(tensors[f"{name}.{ZEROS}"], grid.bits, rows, dim=1) + OFFSETS[version]
    scale = tensors[f"{name}.{SCALES}"]
    return QuantizedWeight(codes.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), grid)


def _groups(columns: int, grid: Grid) -> Tensor:
    return torch.arange(columns, dtype=torch.int32) // grid.width(columns)


def layout(shape: tuple[int, int], grid: Grid) -> Parts:
    """Dtype and shape of every part of a weight of `shape` on `grid`."""
    rows, columns = shape
    groups = columns // grid.width(columns)
    return {
        CODES: (torch.int32, (words.words_for(columns, grid.bits), rows)),
        ZEROS: (torch.int32, (groups, words.words_for(rows, grid.bits))),
        SCALES: (torch.float16, (groups, rows)),
        GROUPS: (torch.int32, (columns,)),
    }


def refuse(version: str, name: str, shape: tuple[int, int], grids: Grids) -> None:
    """FormatError where this layout cannot hold a linear of `shape` on `grids`."""
    weight_only.refuse(version, BITS, name, grids)
    whole = words.WORD // math.gcd(words.WORD, grids.weight.bits)  # the fewest codes that fill words
    for what, count in zip(("rows", "columns"), shape, strict=True):
        weight_only.refuse_shape(version, name, what, count, whole)


def quantization_config(
    version: str, sites: Mapping[str, Grids], kept: Iterable[str], aliases: Mapping[str, Iterable[str]]
) -> dict:
    """What config.json says under `quantization_config`; arguments as those of awq_layout's.

    The grid of most linears is the model's. vLLM asks for fused linears (`qkv_proj`) by names that no file has, so
    rules are as short as they can be: they name the module above wherever all in it are alike.
    """
    modules: dict[Grid, list[str]] = {}
    for name, entry in sites.items():
        modules.setdefault(entry.weight.stored, []).append(name)
    grid = max(modules, key=lambda grid: (len(modules[grid]), grid.bits, grid.group, grid.symmetric))
    kept = list(kept)
    rules: dict[str, dict] = {_rule("-", prefix): {} for prefix in prefixes(kept, sites, aliases)}
    for other, names in sorted(modules.items(), key=lambda item: min(item[1])):
        if other != grid:
            rest = ({*sites} - {*names}) | {*kept}
            rules |= {_rule("+", prefix): _describe(other) for prefix in prefixes(names, rest, aliases)}
    return {**CONFIGS[version], **_describe(grid), "desc_act": False, "lm_head": False, "dynamic": rules}


def _describe(grid: Grid) -> dict:
    return {"bits": grid.bits, "group_size": grid.group, "sym": grid.symmetric}


def _rule(sign: str, prefix: str) -> str:
    return rf"{sign}:^{re.escape(prefix)}(\.|$)"


def grids(config: Mapping, names: Iterable[str]) -> dict[str, Grids]:
    """The grid of each of `names` (linears, by their names in memory) that a `quantization_config` quantizes."""
    rules = config.get("dynamic") or {}
    found = {}
    for name in names:
        rule = next((rule for rule in rules if re.match(rule.lstrip("+-").removeprefix(":"), name)), "")
        if not rule.startswith("-"):
            said = {**config, **rules.get(rule, {})}
            found[name] = Grids(Grid(said["bits"], said["group_size"], said["sym"]))
    return found
