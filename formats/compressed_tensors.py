"""compressed-tensors `pack-quantized`: int32 words that transformers, vLLM and SGLang read.

A quantized linear `name` with a weight (out, in), b bits and G groups in a row has, in place of `name.weight`:

    name.weight_packed      int32 (out, ceil(in * b / 32))     codes, packed along each row, lowest bits first
    name.weight_scale       source dtype (out, G)
    name.weight_shape       int64 (2,)                         (out, in)
    name.weight_zero_point  int32 (ceil(out * b / 32), G)      asymmetric only: zeros, packed down each column

    weight = (codes - zero) * scale

The layout is defined by compressed-tensors 0.18 and later (`compressors/pack_quantized/base.py`), which calls code
c the signed number c - 2**(b - 1) and stores c itself. Earlier releases packed 3, 5 and 6 bits in another way.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vlmq.formats.errors import FormatError
from vlmq.kernels import words
from vlmq.kernels.grid import ROW, Grid, QuantizedWeight

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
VERSION = "0.20.0"  # the release whose layout this is
PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
PARTS = (PACKED, SCALE, SHAPE, ZERO)


def pack(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that stand for `name.weight`; layout above."""
    bits = weight.grid.bits
    tensors = {
        f"{name}.{PACKED}": words.pack(weight.codes, bits, dim=1),
        f"{name}.{SCALE}": weight.scale.contiguous(),
        f"{name}.{SHAPE}": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not weight.grid.symmetric:
        tensors[f"{name}.{ZERO}"] = words.pack(weight.zero, bits, dim=0)
    return tensors


def unpack(name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
    """The exact inverse of `pack`; FormatError where a tensor is absent, or not of the dtype and shape of `grid`."""
    shape = tuple(_part(name, SHAPE, tensors).tolist())
    if len(shape) != 2:
        raise FormatError(f"{name}.{SHAPE}: {len(shape)} dimensions where a linear has 2; export the model again")
    for part, (dtype, expected) in layout(shape, grid).items():
        found = _part(name, part, tensors)
        if tuple(found.shape) != expected or (dtype is not None and found.dtype != dtype):
            raise FormatError(
                f"{name}.{part}: {_say(found.dtype, found.shape)} where a {grid.bits}-bit weight {shape} "
                f"has {_say(dtype or found.dtype, expected)}; export the model again"
            )
    rows, columns = shape
    scale = tensors[f"{name}.{SCALE}"]
    codes = words.unpack(tensors[f"{name}.{PACKED}"], grid.bits, columns, dim=1)
    if grid.symmetric:
        zero = torch.full_like(scale, grid.levels // 2, dtype=torch.uint8)
    else:
        zero = words.unpack(tensors[f"{name}.{ZERO}"], grid.bits, rows, dim=0)
    return QuantizedWeight(codes, scale, zero, grid)


def layout(shape: tuple[int, int], grid: Grid) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Dtype (None: the source's) and shape of every part of a weight of `shape` on `grid`."""
    rows, columns = shape
    groups = columns // grid.width(columns)
    parts: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
        PACKED: (torch.int32, (rows, words.words_for(columns, grid.bits))),
        SCALE: (None, (rows, groups)),
        SHAPE: (torch.int64, (2,)),
    }
    if not grid.symmetric:
        parts[ZERO] = (torch.int32, (words.words_for(rows, grid.bits), groups))
    return parts


def packed_bytes(shape: tuple[int, int], grid: Grid, scale_bytes: int = 2) -> int:
    """Bytes of all parts of a weight of `shape` on `grid`, its scales stored in `scale_bytes` each."""
    return sum(
        torch.Size(size).numel() * (scale_bytes if dtype is None else dtype.itemsize)
        for dtype, size in layout(shape, grid).values()
    )


def quantization_config(sites: Mapping[str, Grid], kept: Iterable[str]) -> dict:
    """What config.json says under `quantization_config`.

    sites: the grid of every quantized linear; kept: the linears that are not. Both by their names IN MEMORY: readers
    match `targets` and `ignore` on those, and on-disk names silently give random weights.

    With one grid the config asks for dense weights at load (`dequantize`): without it transformers fails on
    asymmetric weights, and where `generate()` is called before any forward. With several grids that key would apply
    the first one to every linear, so it is left out; `caveat` says what follows.
    """
    modules: dict[Grid, list[str]] = defaultdict(list)
    for name, grid in sorted(sites.items()):
        modules[grid].append(name)
    kept = sorted(kept)
    groups = {
        f"group_{index}": {
            "targets": patterns(names, set(sites) - set(names) | set(kept)),
            "weights": _weights(grid),
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        for index, (grid, names) in enumerate(sorted(modules.items(), key=lambda group: _order(group[0])))
    }
    config = {
        "quant_method": METHOD,
        "version": VERSION,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": patterns(kept, set(sites)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return config | {"dequantize": True} if len(modules) == 1 else config


def caveat(sites: Mapping[str, Grid]) -> str | None:
    """What a reader must know who loads such a folder with transformers' own `from_pretrained`; None: nothing.

    Seen in transformers 5.23 with compressed-tensors 0.20; `vlmq.exporter.load.load` has no such limits.
    """
    several = len(set(sites.values())) > 1
    if several and not all(grid.symmetric for grid in sites.values()):
        return "transformers cannot load several grids of which some are asymmetric; use vlmq, or --symmetric"
    if several:
        return "in transformers, call the model once before generate(): its first forward unpacks the weights"
    return None


def grids(config: Mapping, names: Iterable[str]) -> dict[str, Grid]:
    """The grid of each of `names` (linears, by their names in memory) that a `quantization_config` quantizes.

    FormatError where the config is of another format or its scheme has no Grid.
    """
    if (config.get("quant_method"), config.get("format")) != (METHOD, FORMAT):
        raise FormatError(
            f"config.json: quantized as {config.get('quant_method')} {config.get('format')}; "
            f"this reads {METHOD} {FORMAT}"
        )
    schemes = [(group["targets"], _grid(group["weights"])) for group in config["config_groups"].values()]
    found = {}
    for name in names:
        if any(_matches(target, name) for target in config.get("ignore", ())):
            continue
        grid = next((grid for targets, grid in schemes if any(_matches(target, name) for target in targets)), None)
        if grid is not None:
            found[name] = grid
    return found


def patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Few targets that match all of `names` and none of `others`: regexes, anchored at both ends.

    Names that differ in their layer numbers alone become one regex, unless it would match one of `others`; then
    their layers are listed in it. A name without a number stays as it is.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[_NUMBER.sub("#", name)].append(name)
    foreign = {_NUMBER.sub("#", name) for name in others}
    targets = []
    for shape, members in sorted(alike.items()):
        if "#" not in shape:
            targets.append(shape)
        elif shape not in foreign:
            targets.append(_regex(shape, r"\d+"))
        elif shape.count("#") == 1:
            layers = sorted((number for name in members for number in _NUMBER.findall(name)), key=int)
            targets.append(_regex(shape, f"({'|'.join(layers)})"))
        else:
            targets.extend(sorted(members))
    return targets


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _regex(shape: str, numbers: str) -> str:
    return "re:^" + re.escape(shape).replace(r"\#", numbers) + "$"


def _matches(target: str, name: str) -> bool:
    """As compressed-tensors matches: `re:` and a pattern, or the whole name (its class names are not used here)."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _weights(grid: Grid) -> dict:
    """The scheme of a grid in compressed-tensors' words."""
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group == ROW else "group",
        "group_size": None if grid.group == ROW else grid.group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _grid(scheme: Mapping) -> Grid:
    if scheme.get("type") != "int" or scheme.get("strategy") not in ("channel", "group"):
        raise FormatError(
            f"config.json: weights of type {scheme.get('type')}, strategy {scheme.get('strategy')}; "
            "this reads integers in groups or rows"
        )
    return Grid(
        scheme["num_bits"], ROW if scheme["strategy"] == "channel" else scheme["group_size"], scheme["symmetric"]
    )


def _order(grid: Grid) -> tuple[int, int, bool]:
    return grid.bits, grid.group, grid.symmetric


def _part(name: str, part: str, tensors: Mapping[str, Tensor]) -> Tensor:
    try:
        return tensors[f"{name}.{part}"]
    except KeyError:
        raise FormatError(f"{name}.{part}: absent; export the model again") from None


def _say(dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
