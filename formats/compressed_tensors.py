"""compressed-tensors `pack-quantized`: int32 words that transformers, vLLM and SGLang read.

A quantized linear `name` with a weight (out, in), b bits and G groups in a row has, in place of `name.weight`:

    name.weight_packed      int32 (out, ceil(in * b / 32))     codes, packed along each row, lowest bits first
    name.weight_scale       source dtype (out, G)
    name.weight_shape       int64 (2,)                         (out, in)
    name.weight_zero_point  int32 (ceil(out * b / 32), G)      asymmetric only: zeros, packed down each column

    weight = (codes - zero) * scale

Where the input of a linear is rounded, the scheme of its config group says to what grid. One range for the whole input
is known beforehand, and its grid is stored:

    name.input_scale        float32 (1,)
    name.input_zero_point   int8 (1,)                          asymmetric only: zero - 2**(b - 1)

The layout is defined by compressed-tensors 0.18 and later (`compressors/pack_quantized/base.py`), which calls code
c the signed number c - 2**(b - 1) and stores c itself. Earlier releases packed 3, 5 and 6 bits in another way. The
tensors of an input are defined by `quantization/lifecycle/initialize.py`. A weight on a TENSOR grid is stored as rows
that share a scale. Limits of an input have no place here: the manifest has them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq.formats import parts
from vlmq.formats.errors import FormatError
from vlmq.formats.parts import Parts
from vlmq.formats.targets import matches, patterns
from vlmq.kernels import words
from vlmq.kernels.grid import ROW, TENSOR, Grid, Limits, QuantizedWeight, between

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
CONFIG = {"quant_method": METHOD, "format": FORMAT}  # how config.json tells this layout
VERSION = "0.20.0"  # the release whose layout this is
PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
INPUT_SCALE, INPUT_ZERO = "input_scale", "input_zero_point"
PARTS = (PACKED, SCALE, SHAPE, ZERO, INPUT_SCALE, INPUT_ZERO)


@dataclass(frozen=True)
class Grids:
    """The grids of a quantized linear: its weight's and, where its input is rounded, the input's, with its limits."""

    weight: Grid
    inputs: Grid | None = None
    limits: Limits | None = None


def pack(
    name: str, weight: QuantizedWeight, inputs: Grid | None = None, limits: Limits | None = None
) -> dict[str, Tensor]:
    """The tensors that stand for `name.weight`, and for the grid of its input where that is stored; layout above."""
    bits = weight.grid.bits
    tensors = {
        f"{name}.{PACKED}": words.pack(weight.codes, bits, dim=1),
        f"{name}.{SCALE}": weight.scale.contiguous(),
        f"{name}.{SHAPE}": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not weight.grid.symmetric:
        tensors[f"{name}.{ZERO}"] = words.pack(weight.zero, bits, dim=0)
    return tensors | pack_input(name, inputs, limits)


def pack_input(name: str, inputs: Grid | None, limits: Limits | None) -> dict[str, Tensor]:
    """The tensors of the grid of an input with one range, which its limits give; none for any other input."""
    if inputs is None or inputs.group != TENSOR:
        return {}
    if limits is None:
        raise FormatError(f"{name}: its input has one range, which is not known; calibrate the model")
    scale, zero = between(torch.tensor([limits.low]), torch.tensor([limits.high]), inputs, torch.float32)
    tensors = {f"{name}.{INPUT_SCALE}": scale}
    if not inputs.symmetric:
        tensors[f"{name}.{INPUT_ZERO}"] = (zero.to(torch.int16) - inputs.levels // 2).to(torch.int8)
    return tensors


def unpack(name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
    """The exact inverse of `pack`; FormatError where a tensor is absent, or not of the dtype and shape of `grid`."""
    shape = tuple(parts.take(name, SHAPE, tensors).tolist())
    if len(shape) != 2:
        raise FormatError(f"{name}.{SHAPE}: {len(shape)} dimensions where a linear has 2; export the model again")
    parts.check(name, tensors, layout(shape, grid), shape, grid)
    rows, columns = shape
    scale = tensors[f"{name}.{SCALE}"]
    codes = words.unpack(tensors[f"{name}.{PACKED}"], grid.bits, columns, dim=1)
    if grid.symmetric:
        zero = torch.full_like(scale, grid.levels // 2, dtype=torch.uint8)
    else:
        zero = words.unpack(tensors[f"{name}.{ZERO}"], grid.bits, rows, dim=0)
    return QuantizedWeight(codes, scale, zero, grid)


def check_input(name: str, tensors: Mapping[str, Tensor], grids: Grids) -> None:
    """FormatError where the stored grid of an input is not the one that its limits give."""
    expected = pack_input(name, grids.inputs, grids.limits)
    for key in (f"{name}.{INPUT_SCALE}", f"{name}.{INPUT_ZERO}"):
        wanted, found = expected.get(key), tensors.get(key)
        if (wanted is None) != (found is None):
            raise FormatError(f"{key}: {'not expected' if wanted is None else 'absent'}; export the model again")
        if wanted is not None and found is not None and not torch.equal(wanted, found):
            raise FormatError(f"{key}: not what the limits of this input give; export the model again")


def layout(shape: tuple[int, int], grid: Grid, inputs: Grid | None = None) -> Parts:
    """Dtype (None: the source's) and shape of every part of a weight of `shape` on `grid`, its input on `inputs`."""
    rows, columns = shape
    groups = columns // grid.width(columns)
    stored: Parts = {
        PACKED: (torch.int32, (rows, words.words_for(columns, grid.bits))),
        SCALE: (None, (rows, groups)),
        SHAPE: (torch.int64, (2,)),
    }
    if not grid.symmetric:
        stored[ZERO] = (torch.int32, (words.words_for(rows, grid.bits), groups))
    if inputs is not None and inputs.group == TENSOR:
        stored[INPUT_SCALE] = (torch.float32, (1,))
        if not inputs.symmetric:
            stored[INPUT_ZERO] = (torch.int8, (1,))
    return stored


def packed_bytes(shape: tuple[int, int], grid: Grid, scale_bytes: int = 2, inputs: Grid | None = None) -> int:
    """Bytes of all parts of a weight of `shape` on `grid`, its scales stored in `scale_bytes` each."""
    return sum(
        torch.Size(size).numel() * (scale_bytes if dtype is None else dtype.itemsize)
        for dtype, size in layout(shape, grid, inputs).values()
    )


def quantization_config(
    sites: Mapping[str, Grids], kept: Iterable[str], aliases: Mapping[str, Iterable[str]] | None = None
) -> dict:
    """What config.json says under `quantization_config`.

    sites: the grids of every quantized linear; kept: the linears that are not. Both by their names IN MEMORY: readers
    match `targets` and `ignore` on those, and on-disk names silently give random weights. aliases: what readers that
    name modules in another way call them; they are matched by those names as well.

    With one grid the config asks for dense weights at load (`dequantize`): without it transformers fails on
    asymmetric weights, and where `generate()` is called before any forward. With several grids that key would apply
    the first one to every linear, and with any it leaves inputs as they are: so it is left out with several, and where
    inputs are rounded and can be. `caveat` says what follows.
    """

    def named(names: Iterable[str]) -> set[str]:
        return {alias for name in names for alias in (name, *(aliases or {}).get(name, ()))}

    modules: dict[_Pair, list[str]] = defaultdict(list)
    for name, grids in sorted(sites.items()):
        modules[_pair(grids)].append(name)
    kept = sorted(kept)
    groups = {
        f"group_{index}": {
            "targets": patterns(sorted(named(names)), named(set(sites) - set(names) | set(kept))),
            "weights": _weights(weight),
            "input_activations": None if inputs is None else _inputs(inputs),
            "output_activations": None,
            "format": FORMAT,
        }
        for index, ((weight, inputs), names) in enumerate(sorted(modules.items(), key=lambda group: _order(*group[0])))
    }
    config = {
        "quant_method": METHOD,
        "version": VERSION,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": patterns(sorted(named(kept)), named(sites)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    dense = len(modules) == 1 and all(inputs is None or not weight.symmetric for weight, inputs in modules)
    return config | {"dequantize": True} if dense else config


UNPACK = "model.hf_quantizer.compressor.decompress_model(model)"  # the line that readers of several grids need


def is_packed_in_transformers(sites: Mapping[str, Grids]) -> bool:
    """Whether transformers leaves the weights packed until UNPACK, or the first forward, and not as it loads them.

    `generate()` of BLIP-2, and of LLaVA with a packed vision tower, reads them before any forward and fails.
    """
    return len({_pair(grids) for grids in sites.values()}) > 1 or any(grids.inputs for grids in sites.values())


def has_t5(names: Iterable[str]) -> bool:
    """Whether linears of a T5 are among these. transformers' T5 looks at its weights as it is loaded, and finds none
    where they are still packed: it needs the dense ones that only a config of one grid can ask for."""
    return any(re.search(r"\.(SelfAttention|EncDecAttention|DenseReluDense)\.", name) for name in names)


def unloadable(sites: Mapping[str, Grids], embedding: str | None = None) -> str | None:
    """Why transformers' own `from_pretrained` cannot load such a folder, or not as it was verified; None: it can."""
    several = len({_pair(grids) for grids in sites.values()}) > 1
    rounded = any(grids.inputs is not None for grids in sites.values())
    asymmetric = not all(grids.weight.symmetric for grids in sites.values())
    if (several or rounded) and has_t5(sites):
        return "transformers cannot load a T5 with several grids or rounded inputs"
    if embedding in sites and (several or rounded):
        return "transformers cannot load a packed embedding beside another grid or rounded inputs"
    if several and asymmetric:
        return "transformers cannot load several grids of which some are asymmetric"
    if rounded and asymmetric:
        return "transformers rounds no inputs where weights are asymmetric"
    return None


def caveat(sites: Mapping[str, Grids], embedding: str | None = None) -> str | None:
    """What a reader must know who loads such a folder, its `embedding` perhaps among the sites, with transformers' own
    `from_pretrained`; None: nothing.

    Seen in transformers 5.24 with compressed-tensors 0.20; `vlmq.exporter.load.load` has no such limits.
    """
    rounded = [(grids.inputs, grids.limits) for grids in sites.values() if grids.inputs is not None]
    dynamic = [inputs for inputs, _ in rounded if inputs.group != TENSOR]
    if why := unloadable(sites, embedding):
        return f"{why}; use vlmq{'' if embedding in sites or has_t5(sites) else ', or --symmetric'}"
    notes = []
    if is_packed_in_transformers(sites):
        notes.append(f"in transformers, unpack the weights before generate(): {UNPACK}")
    if any(inputs.symmetric or inputs.group == ROW for inputs in dynamic):
        notes.append("its scales of inputs are not quite those of vlmq")
    if any(limits for inputs, limits in rounded if inputs.group != TENSOR):
        notes.append("it does not clamp inputs to their limits")
    return "; ".join(notes) or None


def grids(config: Mapping, names: Iterable[str]) -> dict[str, Grids]:
    """The grids of each of `names` (linears, by their names in memory) that a `quantization_config` quantizes.

    Without limits, which it does not know. FormatError where it is of another format or a scheme has no Grid.
    """
    if {key: config.get(key) for key in CONFIG} != CONFIG:
        raise FormatError(
            f"config.json: quantized as {config.get('quant_method')} {config.get('format')}; "
            f"this reads {METHOD} {FORMAT}"
        )
    schemes = [
        (group["targets"], Grids(_weight_grid(group["weights"]), _input_grid(group.get("input_activations"))))
        for group in config["config_groups"].values()
    ]
    found = {}
    for name in names:
        if any(matches(target, name) for target in config.get("ignore", ())):
            continue
        match = next((grids for targets, grids in schemes if any(matches(target, name) for target in targets)), None)
        if match is not None:
            found[name] = match
    return found


_Pair = tuple[Grid, Grid | None]


def _pair(grids: Grids) -> _Pair:
    """What tells one config group from another."""
    return grids.weight.stored, grids.inputs


def _weights(grid: Grid) -> dict:
    """The scheme of a weight's grid in compressed-tensors' words."""
    return _scheme(grid, "channel" if grid.group == ROW else "group", dynamic=False) | {"observer": "minmax"}


def _inputs(grid: Grid) -> dict:
    """The scheme of an input's grid; `dynamic`: its scales are computed as it comes."""
    return _scheme(grid, INPUT_STRATEGIES.get(grid.group, "group"), dynamic=grid.group != TENSOR)


INPUT_STRATEGIES = {ROW: "token", TENSOR: "tensor"}


def _scheme(grid: Grid, strategy: str, dynamic: bool) -> dict:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": strategy,
        "group_size": grid.group if strategy == "group" else None,
        "dynamic": dynamic,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {},
    }


def _weight_grid(scheme: Mapping) -> Grid:
    return _grid("weights", scheme, {"channel": ROW, "group": scheme.get("group_size")}, dynamic=False)


def _input_grid(scheme: Mapping | None) -> Grid | None:
    if scheme is None:
        return None
    groups = {"token": ROW, "tensor": TENSOR, "group": scheme.get("group_size")}
    return _grid("inputs", scheme, groups, dynamic=scheme.get("strategy") != "tensor")


def _grid(what: str, scheme: Mapping, groups: Mapping[str, int | None], dynamic: bool) -> Grid:
    """groups: the group of every strategy that has a Grid."""
    group = groups.get(scheme.get("strategy", ""))
    if scheme.get("type") != "int" or group is None or bool(scheme.get("dynamic")) != dynamic:
        raise FormatError(
            f"config.json: {what} of type {scheme.get('type')}, strategy {scheme.get('strategy')}, dynamic "
            f"{scheme.get('dynamic')}; this reads integers, their {what} by {', '.join(groups)}"
        )
    return Grid(scheme["num_bits"], group, scheme["symmetric"])


def _order(*grids: Grid | None) -> tuple:
    return tuple((grid.bits, grid.group, grid.symmetric) for grid in grids if grid is not None)
