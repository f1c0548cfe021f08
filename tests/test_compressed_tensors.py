"""The layout we write is the one compressed-tensors reads, and its config names exactly the linears we packed."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.utils.match import match_named_modules
from packed import textbook_input
from tiny import VARIANTS, tiny
from torch import nn

from vlmq.formats import compressed_tensors
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.errors import FormatError
from vlmq.kernels.grid import BITS, ROW, TENSOR, Grid, Limits, to_grid

GRIDS = [Grid(bits, group, symmetric) for bits in BITS for group in (32, ROW) for symmetric in (True, False)]
GRIDS += [Grid(8, TENSOR, True), Grid(4, TENSOR, False)]
INPUTS = [Grid(8, ROW), Grid(6, ROW, False), Grid(4, 32), Grid(4, 64, False), Grid(8, TENSOR), Grid(8, TENSOR, False)]
LIMITS = Limits(-1.1, 1.7)


def weight_on(grid: Grid, dtype: torch.dtype = torch.float16, shape: tuple[int, int] = (48, 96)):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(grid.bits))
    return to_grid(weight, grid, dtype)


def scheme_of(grid: Grid) -> QuantizationScheme:
    """compressed-tensors' own reading of our config."""
    config = compressed_tensors.quantization_config({"layer": Grids(grid)}, [])
    config.pop("dequantize")
    return QuantizationConfig.model_validate(config).config_groups["group_0"]


def local(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("layer."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_compressed_tensors_decompresses_what_we_pack(grid):
    weight = weight_on(grid, torch.float32)
    dense = PackedQuantizationCompressor.decompress(local(compressed_tensors.pack("layer", weight)), scheme_of(grid))
    assert torch.equal(dense["weight"], weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_with_16_bit_scales_it_gives_our_weight_rounded_to_them(dtype, symmetric):
    grid = Grid(4, 32, symmetric)
    weight = weight_on(grid, dtype)
    dense = PackedQuantizationCompressor.decompress(local(compressed_tensors.pack("layer", weight)), scheme_of(grid))
    assert torch.equal(dense["weight"], weight.dequantize().to(dtype))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_we_pack_the_very_tensors_that_compressed_tensors_would(grid):
    weight = weight_on(grid, torch.float32)
    zero = (weight.zero.to(torch.int16) - grid.levels // 2).to(torch.int8)
    theirs = PackedQuantizationCompressor.compress(
        {"weight": weight.dequantize(), "weight_scale": weight.scale, "weight_zero_point": zero}, scheme_of(grid)
    )
    ours = local(compressed_tensors.pack("layer", weight))
    assert ours.keys() == theirs.keys()
    for part, tensor in ours.items():
        assert torch.equal(tensor, theirs[part])
        assert tensor.dtype == theirs[part].dtype


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_unpacking_returns_the_same_codes_scale_and_zero(grid):
    weight = weight_on(grid, shape=(33, 96))  # rows that do not fill the last word of the zeros
    found = compressed_tensors.unpack("a.b", compressed_tensors.pack("a.b", weight), grid)
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scale, weight.scale)
    assert torch.equal(found.zero, weight.zero)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_layout_foretells_every_dtype_and_shape(grid):
    tensors = local(compressed_tensors.pack("layer", weight_on(grid)))
    foretold = compressed_tensors.layout((48, 96), grid)
    assert {part: tuple(tensor.shape) for part, tensor in tensors.items()} == {
        part: shape for part, (_, shape) in foretold.items()
    }
    assert all(tensors[part].dtype == (dtype or torch.float16) for part, (dtype, _) in foretold.items())


def test_the_bytes_of_a_tiny_pack_never_change():
    codes = torch.arange(2 * 32).remainder(16).to(torch.uint8).view(2, 32)
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]], dtype=torch.float16)
    zero = torch.tensor([[8, 1], [15, 0]], dtype=torch.uint8)
    weight = compressed_tensors.QuantizedWeight(codes, scale, zero, Grid(4, 16, symmetric=False))
    tensors = compressed_tensors.pack("w", weight)
    assert {name: tensor.numpy().tobytes().hex() for name, tensor in tensors.items()} == {
        "w.weight_packed": "1032547698badcfe" * 4,
        "w.weight_scale": "00380040003c0034",
        "w.weight_shape": "02000000000000002000000000000000",
        "w.weight_zero_point": "f800000001000000",
    }


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda tensors: tensors.pop("w.weight_scale"), "w.weight_scale: absent"),
        (
            lambda tensors: tensors.update({"w.weight_packed": tensors["w.weight_packed"][:, :-1]}),
            "w.weight_packed: int32",
        ),
        (
            lambda tensors: tensors.update({"w.weight_packed": tensors["w.weight_packed"].long()}),
            "w.weight_packed: int64",
        ),
        (lambda tensors: tensors.pop("w.weight_zero_point"), "w.weight_zero_point: absent"),
    ],
)
def test_a_broken_pack_is_refused_in_one_line(break_it, message):
    grid = Grid(4, 32, symmetric=False)
    tensors = compressed_tensors.pack("w", weight_on(grid))
    break_it(tensors)
    with pytest.raises(FormatError, match=message) as refused:
        compressed_tensors.unpack("w", tensors, grid)
    assert "\n" not in str(refused.value)


def by_component(name: str) -> Grids | None:
    """Mixed on purpose: components differ, a layer of one differs from its others, some are kept."""
    if "vision" in name:
        return None if name.endswith("1.mlp.fc2") else Grids(Grid(8, ROW), Grid(8, TENSOR))
    if "layers.0" in name and "mlp" in name:
        return Grids(Grid(3, 32, symmetric=False))
    if "layers.0" in name:
        return Grids(Grid(4, 32), Grid(8, ROW, symmetric=False))
    return Grids(Grid(4, 32)) if "language_model" in name and not name.endswith("lm_head") else None


@pytest.mark.parametrize("variant", VARIANTS)
def test_targets_and_ignore_match_exactly_the_linears_they_mean(variant):
    model = tiny(variant)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    sites = {name: grids for name in linears if (grids := by_component(name)) is not None}
    kept = [name for name in linears if name not in sites]
    config = compressed_tensors.quantization_config(sites, kept)
    for group in QuantizationConfig.model_validate(config).config_groups.values():
        matched = {name for name, _ in match_named_modules(model, group.targets)}
        assert matched == {name for name, grids in sites.items() if meant(grids, group)}
    assert {name for name, _ in match_named_modules(model, config["ignore"])} == set(kept)
    assert compressed_tensors.grids(config, linears) == sites


def meant(grids: Grids, group: QuantizationScheme) -> bool:
    """Whether a config group, as compressed-tensors reads it, says these bits and symmetries."""
    pairs = [(grids.weight, group.weights), (grids.inputs, group.input_activations)]
    return all(
        (grid is None) == (args is None)
        and (grid is None or (grid.bits, grid.symmetric) == (args.num_bits, args.symmetric))
        for grid, args in pairs
    )


@pytest.mark.parametrize("inputs", INPUTS, ids=str)
def test_the_grid_of_an_input_is_said_in_compressed_tensors_words(inputs):
    config = compressed_tensors.quantization_config({"layer": Grids(Grid(4, 32), inputs, LIMITS)}, [])
    args = QuantizationConfig.model_validate(config).config_groups["group_0"].input_activations
    strategy = {ROW: "token", TENSOR: "tensor"}.get(inputs.group, "group")
    assert (args.num_bits, args.symmetric, args.strategy) == (inputs.bits, inputs.symmetric, strategy)
    assert args.dynamic == (inputs.group != TENSOR)
    assert args.group_size == (inputs.group if strategy == "group" else None)
    assert compressed_tensors.grids(config, ["layer"]) == {"layer": Grids(Grid(4, 32), inputs)}  # limits: vlmq.json


@pytest.mark.parametrize("limits", [LIMITS, Limits(-2.0, 2.0), Limits(0.0, 3.0), Limits(-3.0, -1.0)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_rounds_to_the_levels_of_the_input_that_we_store(bits, symmetric, limits):
    """Within the limits. (A value halfway between two levels may go to the other: it adds the zero before rounding.)"""
    inputs = Grid(bits, TENSOR, symmetric)
    config = compressed_tensors.quantization_config({"layer": Grids(Grid(4, 32), inputs, limits)}, [])
    args = QuantizationConfig.model_validate(config).config_groups["group_0"].input_activations
    tensors = local(compressed_tensors.pack_input("layer", inputs, limits))
    assert tensors.keys() == ({"input_scale"} if symmetric else {"input_scale", "input_zero_point"})
    assert all(tensor.shape == (1,) for tensor in tensors.values())
    assert not args.zp_dtype or symmetric or tensors["input_zero_point"].dtype == args.zp_dtype
    x = torch.rand(40, 32, generator=torch.Generator().manual_seed(0)) * (limits.high - limits.low) + limits.low
    theirs = fake_quantize(x, tensors["input_scale"], tensors.get("input_zero_point"), args)
    assert torch.equal(theirs, textbook_input(x, inputs, limits))


def test_one_range_that_nobody_knows_is_refused():
    with pytest.raises(FormatError, match=r"layer: .* calibrate"):
        compressed_tensors.pack("layer", weight_on(Grid(4, 32)), Grid(8, TENSOR))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "channel"}, "inputs of type int, strategy channel"),
        ({"type": "float"}, "inputs of type float"),
        ({"dynamic": False}, "dynamic False"),
    ],
)
def test_an_input_that_has_no_grid_is_refused(change, message):
    config = compressed_tensors.quantization_config({"layer": Grids(Grid(4, 32), Grid(8, ROW))}, [])
    config["config_groups"]["group_0"]["input_activations"] |= change
    with pytest.raises(FormatError, match=message):
        compressed_tensors.grids(config, ["layer"])


def test_linears_whose_inputs_differ_are_groups_of_their_own():
    sites = {"a": Grids(Grid(4, 32)), "b": Grids(Grid(4, 32), Grid(8, ROW)), "c": Grids(Grid(4, 32), Grid(8, TENSOR))}
    groups = compressed_tensors.quantization_config(sites, [])["config_groups"]
    assert sorted(group["targets"] for group in groups.values()) == [["a"], ["b"], ["c"]]


def test_limits_make_no_groups():
    sites = {name: Grids(Grid(4, 32), Grid(8, ROW), Limits(-1.0, high)) for name, high in (("a", 1.0), ("b", 2.0))}
    assert len(compressed_tensors.quantization_config(sites, [])["config_groups"]) == 1


def test_a_weight_with_one_scale_is_a_channel_weight_to_readers():
    sites = {"a": Grids(Grid(8, TENSOR)), "b": Grids(Grid(8, ROW))}
    config = compressed_tensors.quantization_config(sites, [])
    assert [group["weights"]["strategy"] for group in config["config_groups"].values()] == ["channel"]
    assert compressed_tensors.grids(config, ["a", "b"]) == {"a": Grids(Grid(8, ROW)), "b": Grids(Grid(8, ROW))}


def test_layers_that_agree_share_one_regex():
    sites = {f"model.layers.{layer}.fc1": Grids(Grid(4)) for layer in range(40)} | {"projection": Grids(Grid(4))}
    config = compressed_tensors.quantization_config(sites, ["lm_head"])
    assert config["config_groups"]["group_0"]["targets"] == [r"re:^model\.layers\.\d+\.fc1$", "projection"]
    assert config["ignore"] == ["lm_head"]


def test_layers_that_differ_are_told_apart_by_number():
    sites = {f"layers.{layer}.fc": Grids(Grid(8 if layer in (0, 11) else 4)) for layer in range(12)}
    groups = compressed_tensors.quantization_config(sites, [])["config_groups"]
    assert groups["group_1"]["targets"] == [r"re:^layers\.(0|11)\.fc$"]
    assert groups["group_0"]["targets"] == [r"re:^layers\.(1|2|3|4|5|6|7|8|9|10)\.fc$"]


A4, A8, B4 = Grids(Grid(4)), Grids(Grid(8)), Grids(Grid(4, symmetric=False))
ROUNDED, ROUNDED_B4 = Grids(Grid(4), Grid(8, ROW)), Grids(Grid(4, symmetric=False), Grid(8, ROW))
STATIC, CLAMPED = Grids(Grid(4), Grid(8, TENSOR), LIMITS), Grids(Grid(4), Grid(8, ROW), LIMITS)
GROUPED = Grids(Grid(4), Grid(4, 32, symmetric=False))
SEVERAL = "transformers cannot load several grids of which some are asymmetric; use vlmq, or --symmetric"
UNROUNDED = "transformers rounds no inputs where weights are asymmetric; use vlmq, or --symmetric"
UNPACK = "in transformers, unpack the weights before generate(): model.hf_quantizer.compressor.decompress_model(model)"
SCALES, CLAMPS = "its scales of inputs are not quite those of vlmq", "it does not clamp inputs to their limits"


@pytest.mark.parametrize(
    ("sites", "dense", "note"),
    [
        ((A4, A4), True, None),
        ((B4, B4), True, None),
        ((A4, A8), False, UNPACK),
        ((A4, B4), False, SEVERAL),
        ((STATIC, STATIC), False, UNPACK),
        ((GROUPED, GROUPED), False, UNPACK),
        ((ROUNDED, ROUNDED), False, f"{UNPACK}; {SCALES}"),
        ((CLAMPED, CLAMPED), False, f"{UNPACK}; {SCALES}; {CLAMPS}"),
        ((ROUNDED_B4, ROUNDED_B4), True, UNROUNDED),
        ((ROUNDED, A4), False, f"{UNPACK}; {SCALES}"),
        ((ROUNDED, B4), False, SEVERAL),
    ],
)
def test_dense_weights_at_load_are_asked_for_where_nothing_else_is_lost(sites, dense, note):
    named = dict(zip("ab", sites, strict=True))
    assert compressed_tensors.quantization_config(named, []).get("dequantize", False) == dense
    assert compressed_tensors.caveat(named) == note


def test_a_config_of_another_format_is_refused():
    with pytest.raises(FormatError, match="quantized as awq"):
        compressed_tensors.grids({"quant_method": "awq"}, [])
