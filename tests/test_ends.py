"""Output head and token embedding: left alone, quantized where asked, and never one behind the other."""

import json

import onnx_ir as ir
import pytest
import tiny
import torch
from graphs import half
from onnxruntime import InferenceSession
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

from vlmq.exporter import ends, simulate
from vlmq.exporter.calibration import Calibration, prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.verify import audited
from vlmq.exporter.load import load
from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.quantize import quantize
from vlmq.exporter.recipe import make_recipe
from vlmq.formats import compressed_tensors, manifest, onnx_graphs
from vlmq.formats.onnx_graphs import trace
from vlmq.formats.onnx_weights import read_weights
from vlmq.kernels.embedding import QuantizedEmbedding
from vlmq.kernels.graph_embedding import has_operator
from vlmq.kernels.grid import BITS, ROW, Grid, to_grid
from vlmq.kernels.linear import QuantizedLinear

EMBEDDING = {
    "blip2-opt": "language_model.model.decoder.embed_tokens",
    "llava-llama": "model.language_model.embed_tokens",
}
HEAD = {"blip2-opt": "language_model.lm_head", "llava-llama": "lm_head"}
BOTH = {"head": {}, "embedding": {}}
TEXT_ALONE = {"components": {"vision": {"bits": 16}, "connector": {"bits": 16}}}


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tiny_folders):
    """Tiny checkpoints whose heads are their own."""
    folder = tmp_path_factory.mktemp("untied") / "blip2-opt"
    config = tiny.config("blip2-opt")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.12)
    model.half().save_pretrained(folder)
    tiny.processor("blip2-opt").save_pretrained(folder)
    return {"blip2-opt": folder, "llava-llama": tiny_folders["llava-llama"]}


def exported(folder, output, samples, **recipe):
    made = make_recipe({"method": "rtn", "group_size": 32, **recipe})
    pictures = str(samples[0].image.parent)
    return export(
        Request(str(folder), output, made, calibration=pictures, samples=6, formats="safetensors", verify=False)
    )


def refusal(folder, **recipe):
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(VlmqError) as error:
        ends.plan(checkpoint, checkpoint.skeleton(), make_recipe({"method": "rtn", **recipe}))
    return str(error.value)


def source(folder, name):
    """A stored weight, by its name in memory."""
    return open_checkpoint(str(folder)).read(f"{name}.weight")


def batches(folder, variant, samples):
    return prepare(samples[:6], tiny.processor(variant), open_checkpoint(str(folder)).family)


@pytest.mark.parametrize("variant", HEAD)
def test_neither_end_changes_unless_asked_for(variant, untied, random_samples, tmp_path):
    made = exported(untied[variant], tmp_path / "out", random_samples)
    before, after = load_file(untied[variant] / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert made.manifest.kept["language_model.lm_head"] == "output head"  # on disk both families call it so
    for name in before:
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("variant", HEAD)
def test_ends_asked_for_are_rounded_each_to_its_own_grid_and_read_so_again(variant, untied, random_samples, tmp_path):
    recipe = {"head": {"bits": 8}, "embedding": {"bits": 6, "group_size": "row", "symmetric": False}}
    made = exported(untied[variant], tmp_path / "out", random_samples, **recipe)
    model = load(tmp_path / "out")
    head, embedding = model.get_submodule(HEAD[variant]), model.get_submodule(EMBEDDING[variant])
    assert isinstance(head, QuantizedLinear)
    assert isinstance(embedding, QuantizedEmbedding)
    expected = to_grid(source(untied[variant], HEAD[variant]), Grid(8, 32))
    assert torch.equal(head.quantized().codes, expected.codes)
    expected = to_grid(source(untied[variant], EMBEDDING[variant]), Grid(6, -1, symmetric=False))
    assert torch.equal(embedding.quantized().dequantize(), expected.dequantize())
    assert "packed embedding" in made.note
    assert len(manifest.coverage(tmp_path / "out").tensors) == len(made.manifest.tensors)
    assert not any("lm_head" in name or "embed_tokens" in name for name in made.manifest.kept)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("variant", HEAD)
def test_the_head_is_solved_on_what_the_last_norm_puts_out(variant, method, untied, random_samples):
    prepared = batches(untied[variant], variant, random_samples)
    recipe = make_recipe({"method": method, "group_size": 32, "head": {"bits": 3}, "embedding": {}, **TEXT_ALONE})
    model, solved = simulate.simulate_batches(open_checkpoint(str(untied[variant])), recipe, prepared)
    read = []
    model.get_submodule(HEAD[variant]).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        for batch in prepared:
            model(**batch, use_cache=False)
    inputs = torch.cat([rows.flatten(0, 1) for rows in read]).double()
    weight = source(untied[variant], HEAD[variant]).double()
    error = inputs @ (solved[HEAD[variant]].weight.dequantize().double() - weight).T
    expected = error.square().sum() / (inputs @ weight.T).square().sum()
    assert solved[HEAD[variant]].loss == pytest.approx(expected.item(), rel=1e-3)


def test_calibration_never_computes_what_the_head_puts_out(untied, random_samples, monkeypatch):
    checkpoint = open_checkpoint(str(untied["llava-llama"]))
    model = checkpoint.skeleton()
    recipe = make_recipe({"method": "gptq", "group_size": 32, "head": {}, **TEXT_ALONE})
    plan = ends.plan(checkpoint, model, recipe)
    ran, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: ran.append(self) or forward(self, x))
    calibration = Calibration(model, batches(untied["llava-llama"], "llava-llama", random_samples))
    done = list(quantize(checkpoint, model, plan, recipe.assign(plan), calibration))
    assert done[-1].sites["lm_head"].loss > 0
    assert ran
    assert model.lm_head not in ran
    assert "forward" not in vars(model.lm_head)


def test_the_first_block_is_calibrated_on_the_embedding_as_it_will_be(untied, random_samples):
    folder = untied["llava-llama"]
    recipe = make_recipe({"method": "gptq", "group_size": 32, "embedding": {"bits": 2}, **TEXT_ALONE})
    prepared = batches(folder, "llava-llama", random_samples)
    _, solved = simulate.simulate_batches(open_checkpoint(str(folder)), recipe, prepared)
    name = "model.language_model.layers.0.self_attn.q_proj"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    table = model.get_input_embeddings().weight.data
    model.get_input_embeddings().weight.data = to_grid(table, Grid(2, 32)).dequantize()
    read = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        for batch in prepared:
            model(**batch, use_cache=False)
    inputs, weight = torch.cat([rows.flatten(0, 1) for rows in read]), model.get_submodule(name).weight
    error = inputs @ (solved[name].weight.dequantize() - weight).T
    assert solved[name].loss == pytest.approx(
        (error.square().sum() / (inputs @ weight.T).square().sum()).item(), rel=1e-3
    )


def test_a_tied_pair_has_one_grid_and_reads_the_same_values(tiny_folders, random_samples, tmp_path):
    made = exported(tiny_folders["blip2-opt"], tmp_path / "out", random_samples, **BOTH)
    expected = to_grid(source(tiny_folders["blip2-opt"], EMBEDDING["blip2-opt"]), Grid(4, 32)).dequantize()
    model = load(tmp_path / "out")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert torch.equal(head.quantized().dequantize(), expected)
    assert torch.equal(embedding.quantized().dequantize(), expected)
    assert head.qweight.data_ptr() == embedding.qweight.data_ptr()
    assert "token embedding" in made.manifest.kept[HEAD["blip2-opt"]]
    assert made.note is None


@pytest.mark.parametrize("variant", HEAD)
def test_on_one_grid_transformers_and_vlmq_answer_alike(variant, tiny_folders, random_samples, tmp_path):
    exported(tiny_folders[variant], tmp_path / "out", random_samples, **BOTH)
    prepared = batches(tiny_folders[variant], variant, random_samples)[0]
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    with torch.no_grad():
        theirs, ours = model(**prepared).logits, load(tmp_path / "out")(**prepared).logits
    assert torch.allclose(theirs, ours, atol=2e-2 * ours.abs().max().item())  # theirs rounds products to float16
    assert torch.equal(model.get_input_embeddings().weight, source_rounded(tmp_path / "out", variant))


def source_rounded(folder, variant):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "embed_tokens.weight_packed" in name).removesuffix(".weight_packed")
    return compressed_tensors.unpack(name, tensors, Grid(4, 32)).dequantize().half().float()


@pytest.mark.parametrize(
    ("recipe", "where", "remedy"),
    [
        ({"head": {}}, "language_model.lm_head: tied", "ask for embedding as well, or for neither"),
        ({"embedding": {}}, "language_model.model.decoder.embed_tokens: tied", "ask for head as well, or for neither"),
        ({"head": {"bits": 8}, "embedding": {}}, "language_model.lm_head: tied", "give both the same bits"),
        (
            {"head": {"method": "gptq"}, "embedding": {}},
            "language_model.lm_head: tied",
            "leave method, activations and options of head out",
        ),
        ({"head": {"bits": 16}, "embedding": {}}, "language_model.model.decoder.embed_tokens: tied", "or for neither"),
    ],
)
def test_a_tied_end_is_never_quantized_behind_the_others_back(recipe, where, remedy, tiny_folders):
    said = refusal(tiny_folders["blip2-opt"], **recipe)
    assert said.startswith(where)
    assert remedy in said
    assert "\n" not in said


TABLES = [
    *(("llava-llama", Grid(bits, 32, symmetric)) for bits in BITS for symmetric in (True, False)),
    ("blip2-opt", Grid(4, ROW)),
    ("blip2-t5", Grid(4, 32)),
]


@pytest.mark.parametrize(("variant", "grid"), TABLES, ids=str)
def test_onnxruntime_looks_tokens_up_in_the_packed_table(variant, grid, tmp_path):
    model = half(variant)
    before = model.get_input_embeddings()
    packed = QuantizedEmbedding.from_weight(to_grid(before.weight.detach().half(), grid))
    model.set_input_embeddings(packed)
    path = tmp_path / "embed_tokens.onnx"
    ir.save(trace(model, "embed_tokens"), path)
    ids = torch.randint(len(before.weight), (3, 5), generator=torch.Generator().manual_seed(0))
    (found,) = InferenceSession(path).run(None, {"input_ids": ids.numpy()})
    assert torch.equal(torch.from_numpy(found), packed(ids))
    ((name, read),) = read_weights(path).items()
    assert isinstance(model.get_submodule(name), QuantizedEmbedding)
    solved = packed.quantized()
    assert all(torch.equal(getattr(read, part), getattr(solved, part)) for part in ("codes", "scale", "zero"))
    floats = [value for value in ir.load(path).graph.initializers.values() if value.dtype.is_floating_point()]
    assert tuple(before.weight.shape) not in [tuple(value.shape) for value in floats]


def test_a_table_whose_rows_end_within_a_block_is_looked_up_dense(monkeypatch):
    assert not has_operator(Grid(4, ROW), 80)
    assert has_operator(Grid(4, ROW), 96)
    model = half("llava-llama")
    packed = QuantizedEmbedding.from_weight(to_grid(model.get_input_embeddings().weight.detach(), Grid(4, ROW)))
    model.set_input_embeddings(packed)
    monkeypatch.setattr(onnx_graphs, "has_operator", lambda grid, columns: False)
    graph = trace(model, "embed_tokens")
    assert any(
        torch.equal(torch.from_numpy(value.const_value.numpy()), packed.quantized().dequantize())
        for value in graph.graph.initializers.values()
    )
    assert model.get_input_embeddings() is packed


@pytest.mark.parametrize("variant", ["blip2-opt", "llava-llama"])
def test_both_ends_are_packed_in_graphs_as_the_manifest_says(variant, tiny_folders, random_samples, tmp_path):
    request = Request(
        str(tiny_folders[variant]),
        tmp_path / "out",
        make_recipe({"method": "rtn", "group_size": 32, "symmetric": False, **BOTH}),
        calibration=str(random_samples[0].image.parent),
        samples=6,
        verify=False,
    )
    export(request)
    assert audited(tmp_path / "out", tiny_folders[variant])[1] == []
    said = json.loads((tmp_path / "out" / "vlmq.json").read_text())["onnx"]["linears"]
    assert [entry["linears"] for entry in said if entry["product"] == "lookup"] == [1]
