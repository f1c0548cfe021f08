"""The written graphs hold the weights that were solved, nothing that varies, and what their readers look for."""

import hashlib
import io
import os
import warnings
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from graphs import exported, half, quantize
from tiny import DECODERS, config
from transformers import AutoModelForImageTextToText

from vlmq.formats.errors import FormatError
from vlmq.formats.onnx_finish import INLINE_BYTES
from vlmq.formats.onnx_graphs import GRIDS, export, suffix_of, trace
from vlmq.formats.onnx_weights import read_weights
from vlmq.kernels.grid import Grid

PARTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")


def graph(variant: str, part: str) -> onnx.ModelProto:
    return onnx.load(exported(variant).folder / "onnx" / f"{part}_q4.onnx", load_external_data=False)


def session(variant: str, part: str) -> onnxruntime.InferenceSession:
    path = exported(variant).folder / "onnx" / f"{part}_q4.onnx"
    return onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])


def unread(variant: str) -> set[str]:
    """LLaVA reads hidden layer -2, so the last of CLIP's three blocks is no part of the answer."""
    return (
        set()
        if variant == "blip2-opt"
        else {name for name in exported(variant).weights if "vision_tower.encoder.layers.2." in name}
    )


@pytest.mark.parametrize("variant", DECODERS)
def test_the_graphs_hold_the_weights_that_were_solved_bit_for_bit(variant):
    solved = exported(variant)
    read = {}
    for path in (solved.folder / "onnx").glob("*.onnx"):
        read |= read_weights(path)
    assert set(read) == set(solved.weights) - unread(variant)
    for name, weight in read.items():
        assert weight.grid == solved.weights[name].grid
        for field in ("codes", "scale", "zero"):
            left, right = getattr(weight, field), getattr(solved.weights[name], field)
            assert torch.equal(left, right), (name, field)
            assert left.dtype == right.dtype, (name, field)


@pytest.mark.parametrize("variant", DECODERS)
def test_every_quantized_linear_is_one_product_on_packed_codes(variant):
    nodes = [node for part in PARTS for node in graph(variant, part).graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == len(exported(variant).weights) - len(unread(variant))
    assert {onnx.helper.get_node_attr_value(node, "accuracy_level") for node in nodes} == {0}


@pytest.mark.parametrize("variant", DECODERS)
def test_inputs_and_outputs_are_named_as_readers_of_the_folder_expect(variant):
    def described(values) -> dict[str, list[str]]:
        sizes = {value.name: value.type.tensor_type.shape.dim for value in values}
        return {name: [size.dim_param for size in shape if size.dim_param] for name, shape in sizes.items()}

    slots = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    vision, embed, decoder = (graph(variant, part).graph for part in PARTS)
    assert described(vision.input) == {"pixel_values": ["batch_size"]}
    assert described(vision.output) == {"image_features": ["batch_size"]}
    assert described(embed.input) == {"input_ids": ["batch_size", "sequence_length"]}
    assert described(embed.output) == {"inputs_embeds": ["batch_size", "sequence_length"]}
    assert described(decoder.input) == {
        "inputs_embeds": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{slot}": ["batch_size", "past_sequence_length"] for slot in slots},
    }
    assert described(decoder.output) == {
        "logits": ["batch_size", "sequence_length"],
        **{f"present.{slot}": ["batch_size", "total_sequence_length"] for slot in slots},
    }


@pytest.mark.parametrize("variant", DECODERS)
def test_only_tensors_below_a_kibibyte_are_inside_the_graph_file(variant):
    for part in PARTS:
        for tensor in graph(variant, part).graph.initializer:
            outside = tensor.data_location == onnx.TensorProto.EXTERNAL
            size = np.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            assert outside == (size > 1024), tensor.name


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """blip2-opt exported a second time: files, what was printed or warned, the model's settings before and after."""
    model, printed = exported("blip2-opt").packed, io.StringIO()

    def settings() -> tuple:
        return model.config.to_dict(), model.config._attn_implementation, [*model.modules()]

    before = settings()
    with redirect_stdout(printed), redirect_stderr(printed), warnings.catch_warnings(record=True) as warned:
        files = export(model, tmp_path_factory.mktemp("again"))
    return files, printed.getvalue() + "".join(str(one.message) for one in warned), before, settings()


def test_the_same_model_gives_the_same_bytes(again):
    files = again[0]
    assert [path.name for path in files] == [f"{part}_q4.onnx{tail}" for part in PARTS for tail in ("", "_data")]
    for path in files:
        assert digest(path) == digest(exported("blip2-opt").folder / "onnx" / path.name), path.name


def test_an_export_says_nothing_and_leaves_the_model_as_it_was(again):
    _, said, before, after = again
    assert said == ""
    assert before == after


@pytest.mark.parametrize("variant", DECODERS)
def test_a_graph_keeps_no_trace_of_the_machine_that_made_it(variant):
    for part in PARTS:
        model = graph(variant, part)
        assert os.fsencode(os.path.dirname(torch.__file__)) not in model.SerializeToString()
        assert [entry.key for entry in model.metadata_props] == [GRIDS]
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_a_decoder_step_after_any_past_continues_the_prompt():
    """A graph whose layers share a cache agrees on the prompt and is wrong from the first step on."""
    decoder = session("llava-qwen2", "decoder_model_merged")
    source = np.random.default_rng(0)
    embeds = source.standard_normal((2, 7, 64)).astype(np.float32)
    slots = [slot for slot in decoder.get_inputs() if slot.name.startswith("past")]
    empty = {slot.name: np.zeros((2, slot.shape[1], 0, slot.shape[3]), np.float32) for slot in slots}

    def run(start: int, stop: int, past: dict[str, np.ndarray]) -> list[np.ndarray]:
        return decoder.run(
            None,
            {
                "inputs_embeds": embeds[:, start:stop],
                "attention_mask": np.ones((2, stop), np.int64),
                "position_ids": np.tile(np.arange(start, stop), (2, 1)),
                **past,
            },
        )

    whole = run(0, 7, empty)[0]
    for cut in (1, 4, 6):
        _, *past = run(0, cut, empty)
        rest = run(cut, 7, dict(zip(empty, past, strict=True)))[0]
        np.testing.assert_allclose(rest, whole[:, cut:], atol=1e-5)


def test_a_sliding_window_is_in_the_graph():
    settings = config("llava-mistral")
    settings.text_config.sliding_window = 4
    settings.text_config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(settings).eval()
    embeds, mask = torch.randn(2, 9, 64), torch.ones(2, 9, dtype=torch.long)
    with torch.no_grad():
        hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        expected = model.lm_head(hidden).numpy()
    decoder = onnxruntime.InferenceSession(
        ir.to_proto(trace(model, "decoder_model_merged")).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    past = [np.zeros((2, slot.shape[1], 0, slot.shape[3]), np.float32) for slot in decoder.get_inputs()[3:]]
    logits = []
    for step in range(9):
        out, *past = decoder.run(
            None,
            {
                "inputs_embeds": embeds[:, step : step + 1].numpy(),
                "attention_mask": mask[:, : step + 1].numpy(),
                "position_ids": np.full((2, 1), step),
                **{slot.name: value for slot, value in zip(decoder.get_inputs()[3:], past, strict=True)},
            },
        )
        logits.append(out)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, atol=1e-5)


FUSED = {
    ("blip2-opt", "vision_encoder"): {"SkipLayerNormalization", "BiasGelu"},
    ("llava-llama", "decoder_model_merged"): {"FusedMatMul", "QuickGelu"},
}


@pytest.mark.parametrize(("variant", "part"), FUSED, ids=str)
def test_what_onnxruntime_fuses_as_it_loads_a_graph_changes_no_output(variant, part, tmp_path):
    path = exported(variant).folder / "onnx" / f"{part}_q4.onnx"
    options = [onnxruntime.SessionOptions() for _ in range(2)]
    options[0].graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options[1].optimized_model_filepath = os.fspath(tmp_path / "fused.onnx")
    options[1].log_severity_level = 3  # that a saved graph runs on this processor alone
    plain, fused = (
        onnxruntime.InferenceSession(os.fspath(path), option, providers=["CPUExecutionProvider"]) for option in options
    )
    nodes = onnx.load(tmp_path / "fused.onnx", load_external_data=False).graph.node
    assert {node.op_type for node in nodes} >= FUSED[variant, part]

    source = np.random.default_rng(0)
    sizes = {"batch_size": 2, "sequence_length": 3, "past_sequence_length": 5, "total_sequence_length": 8}
    feeds = {
        value.name: source.standard_normal([sizes.get(size, size) for size in value.shape]).astype(np.float32)
        for value in plain.get_inputs()
    }
    if part.startswith("decoder"):
        feeds |= {"attention_mask": np.ones((2, 8), np.int64), "position_ids": np.tile(np.arange(5, 8), (2, 1))}
        feeds["attention_mask"][0, :2] = 0
    for left, right in zip(plain.run(None, feeds), fused.run(None, feeds), strict=True):
        np.testing.assert_allclose(right, left, atol=1e-5)


def test_weights_that_float16_holds_take_two_bytes_and_others_four():
    model = half("llava-llama")
    model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.data[0, 0] = 1 / 3
    weights = [
        tensor
        for tensor in trace(model, "vision_encoder").graph.initializers.values()
        if tensor.const_value.size * 4 > INLINE_BYTES
    ]
    assert sum(weight.dtype == ir.DataType.FLOAT for weight in weights) == 1
    assert sum(weight.dtype == ir.DataType.FLOAT16 for weight in weights) > 10


def test_a_table_stays_in_half_precision_in_memory_too():
    graph = trace(half("llava-llama"), "embed_tokens").graph
    assert [node.op_type for node in graph] == ["Gather", "Cast"]
    assert graph.initializers["model.language_model.embed_tokens.weight"].dtype == ir.DataType.FLOAT16


@pytest.mark.parametrize(
    ("grid", "level", "expected"),
    [
        (Grid(8, 32), 0, "SplitMatMul"),
        (Grid(8, 32), 4, "MatMulNBits"),
        (Grid(6, 32), 4, "SplitMatMul"),
        (Grid(3, 32), 4, "MatMulNBits"),
    ],
)
def test_a_graph_brings_the_functions_that_it_calls_and_no_others(grid, level, expected):
    model = half("llava-llama")
    model.config.vision_feature_layer = 0  # the projector alone
    quantize(model.model.multi_modal_projector, grid)
    traced = trace(model, "vision_encoder", accuracy_level=level)
    nodes = [node for node in traced.graph if node.domain]
    assert [node.op_type for node in nodes] == [expected, expected]
    assert {node.attributes["accuracy_level"].as_int() for node in nodes} == {level}
    assert [name for _, name, _ in traced.functions] == [expected] * (nodes[0].domain == "vlmq")


def test_the_file_names_say_which_container_holds_most_weights():
    model = half("llava-llama")
    assert suffix_of(model) == ""
    quantize(model.model.multi_modal_projector, Grid(8, 32))
    assert suffix_of(model) == "_quantized"
    quantize(model.model.language_model, Grid(3, 32))
    assert suffix_of(model) == "_q4"
    assert suffix_of(model.half()) == "_q4f16"
    assert suffix_of(half("llava-llama").half()) == "_fp16"


def test_models_no_graph_can_be_made_of_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(FormatError, match="load it in float32"):
        export(half("llava-llama").bfloat16(), tmp_path)
    model = half("llava-llama").half()
    quantize(model.model.multi_modal_projector, Grid(8, 32))
    with pytest.raises(FormatError, match="a float16 graph has no product of"):
        export(model, tmp_path)
    model = half("llava-llama")
    model.config.vision_config.model_type = "pixtral"
    with pytest.raises(FormatError, match="no ONNX graph for a pixtral"):
        export(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_graph_of_someone_else_has_no_weights_to_read(tmp_path):
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    other = onnx.helper.make_graph([node], "other", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(other), tmp_path / "other.onnx")
    with pytest.raises(FormatError, match=r"no vlmq\.grids"):
        read_weights(tmp_path / "other.onnx")


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
