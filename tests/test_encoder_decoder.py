"""BLIP-2 with Flan-T5, where it differs from others: every block of the decoder reads what the encoder puts out."""

import json
import os
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from graphs import exported
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from verified_here import measure_here

from vlmq.exporter import ends, modality
from vlmq.exporter.calibration import prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.audit import audit
from vlmq.exporter.families import family_of
from vlmq.exporter.load import load
from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.walk import walk
from vlmq.formats.errors import FormatError
from vlmq.formats.onnx_encoder_decoder import refuse
from vlmq.formats.onnx_weights import read_weights

T5 = "blip2-t5"
PARTS = ("vision_encoder", "embed_tokens", "encoder_model", "decoder_model_merged")
HEAD = "language_model.lm_head"


def tied_folder(folder, scaled):
    """The tiny checkpoint without a head: transformers ties it then, and scales what it reads where config.json says
    that it is tied."""
    tiny.tiny_folder(T5, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{HEAD}.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["tie_word_embeddings"] = scaled
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def request_to(folder, output, pictures, **recipe):
    made = make_recipe({"group_size": 32, **recipe})
    return Request(
        str(folder), output, made, formats="safetensors", calibration=str(pictures), samples=6, verify=False, gate=False
    )


@torch.no_grad()
def logits(model):
    asked = tiny.forward_inputs(T5, tiny.processor(T5)(images=picture(), text="how many ?", return_tensors="pt"))
    return model(**asked).logits


def picture():
    from PIL import Image

    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (20, 20, 3), dtype=np.uint8))


@pytest.mark.parametrize("scaled", [True, False])
def test_a_head_that_is_not_stored_is_the_embedding_and_is_read_as_transformers_reads_it(scaled, tmp_path, pictures):
    checkpoint = open_checkpoint(str(tied_folder(tmp_path / "model", scaled)))
    assert ends.find(checkpoint.skeleton()).tied
    expected = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert expected.config.text_config.scale_decoder_outputs is scaled
    assert torch.equal(logits(checkpoint.model()), logits(expected))
    both = {"bits": 4, "method": "rtn", "head": {}, "embedding": {}}
    export(request_to(tmp_path / "model", tmp_path / "out", pictures, **both))
    model = load(tmp_path / "out")
    assert model.language_model.decoder.embed_tokens is model.language_model.shared
    assert torch.equal(model.language_model.lm_head.quantized().codes, model.language_model.shared.quantized().codes)
    found, _ = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    torch.testing.assert_close(logits(model), logits(found), rtol=1e-2, atol=1e-2)


def test_a_head_that_is_stored_is_its_own_and_can_be_quantized_alone(tiny_folders, tmp_path, pictures):
    checkpoint = open_checkpoint(str(tiny_folders[T5]))
    assert not ends.find(checkpoint.skeleton()).tied
    assert walk(checkpoint.skeleton(), checkpoint.family).kept[HEAD] == "output head"
    export(request_to(tiny_folders[T5], tmp_path / "out", pictures, method="gptq", head={"bits": 4}))
    before, after = load_file(tiny_folders[T5] / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert f"{HEAD}.weight_packed" in after
    assert torch.equal(before["language_model.shared.weight"], after["language_model.shared.weight"])


def test_encoder_and_decoder_read_what_they_read_when_the_model_answers(random_samples):
    batches = prepare(random_samples[:2], tiny.processor(T5), family_of(tiny.config(T5)))
    tokenizer = tiny.tokenizer()
    for batch, question in zip(batches, ("how many?", "what is the colour of the circle?"), strict=True):
        assert batch["input_ids"].tolist() == [
            [4] * 4 + tokenizer(f"Question: {question} Short answer:", add_special_tokens=False)["input_ids"]
        ]
        assert batch["decoder_input_ids"].tolist() == [[0, *tokenizer("red", add_special_tokens=False)["input_ids"]]]


def test_modality_weights_are_the_ratios_of_plain_autograds_gradients_in_the_encoder(tiny_folders, random_samples):
    checkpoint = open_checkpoint(str(tiny_folders[T5]))
    (batch,) = prepare(random_samples[:1], tiny.processor(T5), checkpoint.family)
    model = AutoModelForImageTextToText.from_pretrained(tiny_folders[T5], dtype=torch.float32)
    outputs = []
    for block in model.language_model.encoder.block:
        block.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    chances = model(**batch).logits[0].log_softmax(-1)
    for output in outputs:
        output.retain_grad()
    said = batch["decoder_input_ids"][0]
    (-sum(chances[place, said[place + 1]] for place in range(len(said) - 1)) / (len(said) - 1)).backward()
    seen = batch["input_ids"][0] == 4
    expected = {
        f"language_model.encoder.block.{index}": (
            output.grad[0].abs().mean(-1)[seen].mean() / output.grad[0].abs().mean(-1)[~seen].mean()
        ).item()
        for index, output in enumerate(outputs)
    }
    assert modality.weights(checkpoint, [batch]) == pytest.approx(expected, rel=1e-4)


class Stopped(Exception):  # noqa: N818 - as a person stops a run
    pass


@pytest.mark.parametrize("block", [7, 9])  # in the encoder and in the decoder, behind their first blocks
def test_a_run_stopped_in_either_stack_goes_on_with_the_positions_of_its_first_block(
    block, tiny_folders, pictures, tmp_path
):
    recipe = {"method": "gptq", "options": {"gptaq": True}}
    export(request_to(tiny_folders[T5], tmp_path / "whole", pictures, **recipe))
    request = request_to(tiny_folders[T5], tmp_path / "out", pictures, **recipe)

    def stop(what, done, of, at=""):
        if what == "quantizing" and done >= block:
            raise Stopped

    with pytest.raises(Stopped):
        export(request, stop)
    begun = []
    export(request, lambda what, done, of, at="": begun.append(done))
    assert begun[0] == block
    for name in ("model.safetensors", "vlmq.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_qvlm_cannot_tune_the_vision_encoder_before_it(tiny_folders):
    checkpoint = open_checkpoint(str(tiny_folders[T5]))
    recipe = {"method": "qvlm", "group_size": 32, "activations": {"bits": 8}}
    with pytest.raises(VlmqError, match="cannot tune the vision encoder before an encoder-decoder; set --option"):
        make_recipe(recipe).assign(walk(checkpoint.skeleton(), checkpoint.family))


@torch.no_grad()
def test_both_formats_of_an_export_pass_the_audit_and_say_what_a_forward_with_the_answer_says(
    tiny_folders, random_samples, pictures, tmp_path
):
    export(replace(request_to(tiny_folders[T5], tmp_path / "out", pictures, method="awq"), formats="both"))
    found = audit(tmp_path / "out", tiny_folders[T5])
    assert found.faults == ()
    assert set(found.compared) == {"safetensors", "onnx"}
    probes, said = random_samples[8:10], [[30, 11], [25]]
    torch_, onnx_ = (measure_here(tmp_path / "out", engine, probes, forced=said) for engine in ("torch", "onnx"))
    assert torch_.tokens == onnx_.tokens
    assert torch_.lengths == [3, 2]
    np.testing.assert_allclose(onnx_.outputs["logits"], torch_.outputs["logits"], atol=1e-4)
    model, expected = load(tmp_path / "out"), []
    for sample, answer in zip(probes, said, strict=True):
        (asked,) = prepare([sample], tiny.processor(T5), family_of(model.config))
        expected.append(model(**asked | {"decoder_input_ids": torch.tensor([[0, *answer]])}).logits[0])
    np.testing.assert_allclose(torch_.outputs["logits"], torch.cat(expected).numpy(), atol=1e-4)


def graph(part):
    return exported(T5).folder / "onnx" / f"{part}_q4.onnx"


def session(part):
    return onnxruntime.InferenceSession(os.fspath(graph(part)), providers=["CPUExecutionProvider"])


def test_the_graphs_hold_every_weight_once_and_the_cross_attention_s_keys_where_the_encoder_ends():
    solved = exported(T5).weights
    read = {part: read_weights(graph(part)) for part in PARTS}
    assert sum(map(len, read.values())) == len(solved)
    for found in read.values():
        for name, weight in found.items():
            assert torch.equal(weight.codes, solved[name].codes), name
            assert torch.equal(weight.scale, solved[name].scale), name
            assert torch.equal(weight.zero, solved[name].zero), name
    crossing = {name for name in solved if name.endswith(("EncDecAttention.k", "EncDecAttention.v"))}
    assert len(crossing) == 4
    assert crossing <= set(read["encoder_model"])
    assert all(name.startswith("language_model.decoder.") for name in read["decoder_model_merged"])
    nodes = [node for part in PARTS for node in onnx.load(graph(part), load_external_data=False).graph.node]
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == len(solved)


def test_a_decoder_step_after_any_past_continues_the_answer_as_transformers_says_it():
    """Against the dequantized model's forward, which has no cache at all; questions of two lengths, padded."""
    model = exported(T5).dense.language_model
    encoder, decoder = session("encoder_model"), session("decoder_model_merged")
    source = np.random.default_rng(0)
    asked, said = (source.standard_normal((2, length, 64)).astype(np.float32) for length in (6, 7))
    mask = np.array([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        expected = model(
            inputs_embeds=torch.from_numpy(asked),
            attention_mask=torch.from_numpy(mask),
            decoder_inputs_embeds=torch.from_numpy(said),
            use_cache=False,
        ).logits.numpy()
    cross = encoder.run(None, {"inputs_embeds": asked, "encoder_attention_mask": mask})
    slots = [slot.name for slot in decoder.get_inputs() if slot.name.startswith("past")]
    empty = [np.zeros((2, 8, 0, 16), np.float32)] * (len(slots) - len(cross))

    def run(start, stop, past):
        fed = {"inputs_embeds": said[:, start:stop], "encoder_attention_mask": mask}
        return decoder.run(None, fed | dict(zip(slots, [*past, *cross], strict=True)))

    np.testing.assert_allclose(run(0, 7, empty)[0], expected, atol=2e-5)
    for cut in (1, 4, 6):
        _, *past = run(0, cut, empty)
        np.testing.assert_allclose(run(cut, 7, past)[0], expected[:, cut:], atol=2e-5)


def test_what_the_graphs_read_and_make_is_named_by_layer_and_stack():
    def described(values):
        sizes = {value.name: value.type.tensor_type.shape.dim for value in values}
        return {name: [size.dim_param for size in shape if size.dim_param] for name, shape in sizes.items()}

    encoder, decoder = (onnx.load(graph(part), load_external_data=False).graph for part in PARTS[2:])
    slots = [f"{layer}.{{}}.{part}" for layer in range(2) for part in ("key", "value")]
    asked = ["batch_size", "encoder_sequence_length"]
    assert described(encoder.input) == {"inputs_embeds": asked, "encoder_attention_mask": asked}
    assert described(encoder.output) == {f"present.{slot.format('encoder')}": asked for slot in slots}
    assert described(decoder.input) == {
        "inputs_embeds": ["batch_size", "sequence_length"],
        "encoder_attention_mask": asked,
        **{f"past_key_values.{slot.format('decoder')}": ["batch_size", "past_sequence_length"] for slot in slots},
        **{f"past_key_values.{slot.format('encoder')}": asked for slot in slots},
    }
    assert described(decoder.output) == {
        "logits": ["batch_size", "sequence_length"],
        **{f"present.{slot.format('decoder')}": ["batch_size", "total_sequence_length"] for slot in slots},
    }


def test_two_embeddings_have_no_graph():
    model = tiny.tiny(T5)
    model.language_model.decoder.embed_tokens.weight = torch.nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(FormatError, match="encoder and decoder have embeddings of their own"):
        refuse(model)
