"""AWQ's and GPTQ's words hold what bit arithmetic reads from them, and their configs name exactly what is quantized."""

import re

import numpy as np
import pytest
import torch
from tiny import DECODERS, tiny
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from vlmq.formats import layouts
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.errors import FormatError
from vlmq.formats.layouts import LAYOUTS
from vlmq.kernels.grid import ROW, TENSOR, Grid, QuantizedWeight, to_grid

AWQ, V1, V2 = LAYOUTS["awq"], LAYOUTS["gptq"], LAYOUTS["gptq-v2"]
GROUPED = [(group, symmetric) for group in (16, 32, 64, 128, ROW) for symmetric in (True, False)]
HELD = [("awq", Grid(4, *grouped)) for grouped in GROUPED]
HELD += [(to, Grid(bits, *grouped)) for to in ("gptq", "gptq-v2") for bits in (2, 3, 4, 8) for grouped in GROUPED]


def weight_on(grid: Grid, dtype: torch.dtype = torch.float16, shape: tuple[int, int] = (32, 128)) -> QuantizedWeight:
    """Codes, zeros (from 1 on, as version 1 of GPTQ needs) and scales of all sizes, not fitted to anything."""
    generator = torch.Generator().manual_seed(grid.bits)
    rows, columns = shape
    groups = columns // grid.width(columns)
    codes = torch.randint(0, grid.levels, shape, generator=generator, dtype=torch.uint8)
    zero = torch.randint(1, grid.levels, (rows, groups), generator=generator, dtype=torch.uint8)
    if grid.symmetric:
        zero = torch.full_like(zero, grid.levels // 2)
    return QuantizedWeight(codes, torch.rand(rows, groups, generator=generator).half().to(dtype), zero, grid)


def local(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name.removeprefix("a.b."): tensor.numpy() for name, tensor in tensors.items()}


def bits_of(words: np.ndarray, bits: int) -> np.ndarray:
    """Every value in a string of words, lowest bits first, by arithmetic on one long integer."""
    string = int.from_bytes(words.astype("<i4").tobytes(), "little")
    return np.array([(string >> place) & (2**bits - 1) for place in range(0, 32 * len(words), bits)])


@pytest.mark.parametrize("group", [16, 128, ROW])
def test_the_words_of_awq_are_read_by_shifts_in_its_order(group):
    weight = weight_on(Grid(4, group, symmetric=False))
    tensors = local(AWQ.pack("a.b", weight, Grids(weight.grid)))
    shifts = [0, 16, 4, 20, 8, 24, 12, 28]  # of rows 8c to 8c + 7 in word c

    def read(words: np.ndarray) -> np.ndarray:
        rows = [words.view(np.uint32)[:, row // 8] >> shifts[row % 8] & 15 for row in range(32)]
        return np.stack(rows)

    assert (read(tensors["qweight"]) == weight.codes.numpy()).all()
    assert (read(tensors["qzeros"]) == weight.zero.numpy()).all()
    assert (tensors["scales"] == weight.scale.numpy().T).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("to", "offset"), [("gptq", 1), ("gptq-v2", 0)])
def test_the_words_of_gptq_are_strings_of_bits_down_columns_and_along_zeros(bits, to, offset):
    weight = weight_on(Grid(bits, 32, symmetric=False))
    tensors = local(LAYOUTS[to].pack("a.b", weight, Grids(weight.grid)))
    for row in range(32):
        assert (bits_of(tensors["qweight"][:, row], bits) == weight.codes[row].numpy()).all()
    for group in range(4):
        assert (bits_of(tensors["qzeros"][group], bits) + offset == weight.zero[:, group].numpy()).all()
    assert (tensors["scales"] == weight.scale.numpy().T).all()
    assert (tensors["g_idx"] == np.repeat(range(4), 32)).all()


@pytest.mark.parametrize(
    ("to", "bits", "word"),
    [
        ("awq", 4, 0x88888888),
        ("gptq", 4, 0x77777777),
        ("gptq-v2", 4, 0x88888888),
        ("gptq", 8, 0x7F7F7F7F),
        ("gptq", 2, 0x55555555),
        ("gptq-v2", 2, 0xAAAAAAAA),
    ],
)
def test_symmetric_zeros_are_the_middle_or_one_less(to, bits, word):
    weight = weight_on(Grid(bits, 32))
    assert (local(LAYOUTS[to].pack("a.b", weight, Grids(weight.grid)))["qzeros"].view(np.uint32) == word).all()


@pytest.mark.parametrize(("to", "grid"), HELD, ids=str)
def test_unpacking_returns_the_same_codes_scale_and_zero(to, grid):
    weight = weight_on(grid)
    found = LAYOUTS[to].unpack("a.b", LAYOUTS[to].pack("a.b", weight, Grids(grid)), grid)
    assert found.grid == grid
    for ours, theirs in ((found.codes, weight.codes), (found.scale, weight.scale), (found.zero, weight.zero)):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous()


@pytest.mark.parametrize(("to", "grid"), HELD, ids=str)
def test_the_layout_foretells_every_dtype_and_shape(to, grid):
    tensors = LAYOUTS[to].pack("a.b", weight_on(grid), Grids(grid))
    foretold = LAYOUTS[to].layout((32, 128), Grids(grid))
    assert {f"a.b.{part}": size for part, (_, size) in foretold.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert all(tensors[f"a.b.{part}"].dtype == dtype for part, (dtype, _) in foretold.items())


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("awq", {"qweight": "20643175" * 16, "qzeros": "20643175", "scales": "003c0040004200440045004600470048"}),
        ("gptq", {"qweight": "".join(8 * str(row) for row in range(8)) * 2, "qzeros": "10325476"}),
    ],
)
def test_the_bytes_of_a_tiny_pack_never_change(to, expected):
    """Row r has code r everywhere and the scale r + 1; the zero of row r is r, or r + 1 where zeros begin at 1."""
    rows = torch.arange(8, dtype=torch.uint8)[:, None]
    weight = QuantizedWeight(rows.expand(8, 16), (rows + 1).half(), rows + (to == "gptq"), Grid(4, ROW, False))
    tensors = LAYOUTS[to].pack("w", weight, Grids(weight.grid))
    assert {part: tensors[f"w.{part}"].numpy().tobytes().hex() for part in expected} == expected


def test_a_zero_of_0_is_refused_by_version_1_alone():
    weight = weight_on(Grid(4, 32, symmetric=False))
    weight.zero[3, 1] = 0
    assert torch.equal(V2.unpack("a.b", V2.pack("a.b", weight, Grids(weight.grid)), weight.grid).zero, weight.zero)
    assert torch.equal(AWQ.unpack("a.b", AWQ.pack("a.b", weight, Grids(weight.grid)), weight.grid).zero, weight.zero)
    with pytest.raises(FormatError, match=r"^a\.b: has a zero of 0, which gptq cannot store; choose gptq-v2$"):
        V1.pack("a.b", weight, Grids(weight.grid))


@pytest.mark.parametrize("to", ["awq", "gptq", "gptq-v2"])
def test_scales_that_float16_does_not_hold_are_refused_and_others_are_not(to):
    exact = weight_on(Grid(4, 32), torch.float32)
    assert torch.equal(LAYOUTS[to].pack("a.b", exact, Grids(exact.grid))["a.b.scales"].float(), exact.scale.T)
    for value, dtype in ((1 / 3, torch.float32), (1e38, torch.bfloat16), (2.0**-30, torch.bfloat16)):
        weight = QuantizedWeight(exact.codes, torch.full_like(exact.scale, value).to(dtype), exact.zero, exact.grid)
        with pytest.raises(FormatError, match=rf"^a\.b: {to} stores scales in float16, .*these {str(dtype)[6:]} ones"):
            LAYOUTS[to].pack("a.b", weight, Grids(weight.grid))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qweight", None, "qweight: absent"),
        ("qzeros", None, "qzeros: absent"),
        ("scales", lambda tensor: tensor.float(), "scales: float32"),
        (
            "qweight",
            lambda tensor: tensor[:, :-1],
            "(qzeros|scales): .* where a 4-bit weight",
        ),  # the rest does not fit it
        ("qweight", lambda tensor: tensor[0], "qweight: 1 dimensions where words have 2"),
        ("g_idx", lambda tensor: tensor.flip(0), "g_idx: columns are not in the order"),
    ],
)
@pytest.mark.parametrize("to", ["awq", "gptq"])
def test_a_broken_pack_is_refused_in_one_line(to, part, change, message):
    layout, grid = LAYOUTS[to], Grid(4, 32)
    if part not in layout.parts:
        return
    tensors = layout.pack("w", weight_on(grid), Grids(grid))
    found = tensors.pop(f"w.{part}")
    if change:
        tensors[f"w.{part}"] = change(found)
    with pytest.raises(FormatError, match=f"^w.{message}") as refused:
        layout.unpack("w", tensors, grid)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("to", "shape", "grids", "message"),
    [
        ("awq", (32, 128), Grids(Grid(4, 32), Grid(8, ROW)), "awq rounds no inputs"),
        ("gptq", (32, 128), Grids(Grid(4, 32), Grid(8, TENSOR)), "gptq rounds no inputs"),
        ("awq", (32, 128), Grids(Grid(3, 32)), "3 bits, awq has 4"),
        ("gptq", (32, 128), Grids(Grid(5, 32)), "5 bits, gptq has 2, 3, 4, 8"),
        ("awq", (32, 256), Grids(Grid(4, 256)), "groups of 256 columns"),
        ("gptq-v2", (32, 96), Grids(Grid(4, 48)), "groups of 48 columns"),
        ("awq", (36, 128), Grids(Grid(4, 32)), "36 rows, awq needs a multiple of 8"),
        ("gptq", (36, 128), Grids(Grid(4, 32)), "36 rows, gptq needs a multiple of 8"),
        ("gptq", (48, 128), Grids(Grid(3, 32)), "48 rows, gptq needs a multiple of 32"),
        ("gptq-v2", (32, 40), Grids(Grid(2, ROW)), "40 columns, gptq-v2 needs a multiple of 16"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_by_name(to, shape, grids, message):
    with pytest.raises(FormatError, match=rf"^a\.b: {message}.*; choose compressed-tensors$"):
        LAYOUTS[to].refuse("a.b", shape, grids)


@pytest.mark.parametrize(("to", "grid"), HELD, ids=str)
def test_what_a_layout_holds_is_not_refused(to, grid):
    LAYOUTS[to].refuse("a.b", (32, 128), Grids(grid))


def linears_of(variant: str) -> list[str]:
    return [name for name, module in tiny(variant).named_modules() if isinstance(module, nn.Linear)]


CHOICES = {
    "language": lambda name: "language_model.model" in name or "language_model.layers" in name,
    "vision": lambda name: "vision" in name,
    "all but a layer": lambda name: "lm_head" not in name and "layers.1." not in name,
    "all but a kind": lambda name: "lm_head" not in name and not name.endswith(("q_proj", "qkv", "fc1", "query")),
}


@pytest.mark.parametrize("variant", DECODERS)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_transformers_and_vllm_convert_for_awq_exactly_what_is_quantized(variant, choice):
    linears = linears_of(variant)
    sites = {name: Grids(Grid(4, 32)) for name in linears if choice(name)}
    aliases = {name: (f"disk.{name.removeprefix('model.')}",) for name in linears}
    kept = set(linears) - set(sites)
    config = AWQ.quantization_config(sites, kept, aliases)
    patterns = config["modules_to_not_convert"]
    assert {name for name in linears if should_convert_module(name, patterns)} == set(sites)
    # vLLM looks for each pattern anywhere in its own name of a linear, which is like the one on disk
    for names in (linears, [aliases[name][0] for name in linears]):
        converted = [name for name in names if not any(pattern in name for pattern in patterns)]
        assert converted == [name for name, linear in zip(names, linears, strict=True) if linear in sites]
    assert len(patterns) <= 2 * len(kept)
    assert AWQ.grids(config, linears) == sites


def test_a_layer_that_is_kept_does_not_keep_those_whose_numbers_begin_with_its_number():
    linears = [f"model.layers.{layer}.{kind}" for layer in range(12) for kind in ("fc1", "fc2")]
    kept = {name for name in linears if ".1." in name}
    for layout in (AWQ, V1):
        sites = {name: Grids(Grid(4, 32)) for name in linears if name not in kept}
        assert layout.grids(layout.quantization_config(sites, kept, {}), linears) == sites


def test_a_component_that_is_kept_whole_is_one_pattern_of_each_name():
    linears = linears_of("llava-llama")
    sites = {name: Grids(Grid(4, 32)) for name in linears if "language_model" in name}
    aliases = {name: (name.removeprefix("model."),) for name in linears}
    patterns = AWQ.quantization_config(sites, set(linears) - set(sites), aliases)["modules_to_not_convert"]
    assert patterns == [
        "lm_head",
        "model.multi_modal_projector",
        "model.vision_tower",
        "multi_modal_projector",
        "vision_tower",
    ]


def test_a_kept_linear_whose_name_is_inside_a_quantized_one_is_refused():
    sites = {"model.up.proj_in": Grids(Grid(4, 32))}
    with pytest.raises(FormatError, match=r"^up\.proj: readers would take model\.up\.proj_in for it; "):
        AWQ.quantization_config(sites, ["up.proj"], {})


def by_dynamic(config: dict, name: str) -> dict | None:
    """vLLM's reading: the first rule whose regex matches from the start; None: not quantized."""
    for rule, changed in config["dynamic"].items():
        if re.match(rule[2:], name):
            return None if rule.startswith("-:") else {**config, **changed}
    return config


@pytest.mark.parametrize("variant", DECODERS)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("to", ["gptq", "gptq-v2"])
def test_rules_of_gptq_give_every_linear_the_grid_it_has(variant, choice, to):
    linears = linears_of(variant)
    eyes, tongue, other = Grid(8, ROW), Grid(4, 32, symmetric=False), Grid(3, 64)
    sites = {
        name: Grids(other if "layers.0" in name and "mlp" in name else eyes if "vision" in name else tongue)
        for name in linears
        if choice(name)
    }
    aliases = {name: (f"disk.{name}",) for name in linears}
    config = LAYOUTS[to].quantization_config(sites, set(linears) - set(sites), aliases)
    for name in linears:
        for said in (by_dynamic(config, name), by_dynamic(config, f"disk.{name}")):
            found = said and Grid(said["bits"], said["group_size"], said["sym"])
            assert found == (sites[name].weight if name in sites else None)
    assert LAYOUTS[to].grids(config, linears) == sites


def test_a_second_grid_is_refused_by_awq():
    sites = {"a": Grids(Grid(4, 32)), "b": Grids(Grid(4, 64))}
    with pytest.raises(FormatError, match=r"^b: not on the grid of a, and awq has one.*; choose compressed-tensors$"):
        AWQ.quantization_config(sites, [], {})


def test_a_config_tells_its_layout_and_a_foreign_one_is_refused():
    for to, layout in LAYOUTS.items():
        config = layout.quantization_config({"a": Grids(Grid(4, 32))}, [], {})
        assert layouts.of_config(config) is LAYOUTS[to]
    for foreign in ({}, {"quant_method": "awq", "version": "gemv"}, {"quant_method": "gptq"}):
        with pytest.raises(FormatError, match=r"^config\.json: quantized as .*; this reads compressed-tensors, awq"):
            layouts.of_config(foreign)


def test_rounding_to_nearest_survives_every_layout_that_holds_it():
    weight = to_grid(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), Grid(4, 32, False))
    dense = weight.dequantize()
    for layout in LAYOUTS.values():
        found = layout.unpack("w", layout.pack("w", weight, Grids(weight.grid)), weight.grid)
        assert torch.equal(found.dequantize(), dense)
