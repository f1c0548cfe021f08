"""What onnxruntime-genai needs beside the graphs, so that the same folder serves it too.

    genai_config.json                 the graphs' files, inputs and outputs, and the language model's dimensions
    onnx/embed_merge<suffix>.onnx     input_ids, image_features -> inputs_embeds: the token embedding, image features in
                                      the image tokens' places; its table is the one in embed_tokens' file

Read by onnxruntime-genai 0.18. It knows no BLIP-2 and no LLaVA, but its `gemma3` is vision, embedding and decoder as
they are here. Pixels and tokens are the caller's to give (`Generator.set_inputs`): its processors are of other models.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vlmq.formats.errors import FormatError

CONFIG = "genai_config.json"
MERGE = "embed_merge"
KIND = "gemma3"


def write(folder: Path, config: Any) -> list[Path]:
    """Complete a folder whose onnx/ holds the graphs; config: the model's, as transformers has it.

    Nothing for an encoder-decoder: onnxruntime-genai has no such model with images.
    """
    if config.text_config.is_encoder_decoder:
        return []
    files = {name: _graph(folder, name) for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")}
    merge = files["embed_tokens"].with_name(files["embed_tokens"].name.replace("embed_tokens", MERGE))
    ir.save(merged(files["embed_tokens"], config.image_token_id), merge)  # what lies outside stays where it lies
    described = describe(config, {name: f"onnx/{path.name}" for name, path in {**files, MERGE: merge}.items()})
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return [folder / CONFIG, merge]


def _graph(folder: Path, name: str) -> Path:
    found = sorted((folder / "onnx").glob(f"{name}*.onnx"))
    if len(found) != 1:
        raise FormatError(f"{folder / 'onnx'}: {len(found)} files {name}*.onnx, not one; export again")
    return found[0]


def merged(embed_tokens: Path, image_token: int) -> ir.Model:
    """The graph of embed_tokens, with image features (images, tokens, width) in the image tokens' places, in order."""
    model = ir.load(embed_tokens)
    graph = model.graph
    (tokens,), (embeds,) = graph.inputs, graph.outputs
    assert embeds.shape is not None
    width = embeds.shape[2]
    assert isinstance(width, int)
    features = ir.Value(
        name="image_features",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(["num_images", "image_tokens", width]),
    )
    graph.inputs.append(features)

    def constant(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        graph.initializers[name] = value
        return value

    def node(kind: str, inputs: list[ir.Value], output: str, **attributes: Any) -> ir.Value:
        made = ir.node(kind, inputs, attributes, name=f"{MERGE}/{output}")
        made.outputs[0].name = f"{MERGE}/{output}"
        graph.append(made)
        return made.outputs[0]

    zero, one = (constant(f"{MERGE}/{name}", np.array(number, np.int64)) for name, number in (("0", 0), ("1", 1)))
    is_image = node("Equal", [tokens, constant(f"{MERGE}/image_token", np.array(image_token, np.int64))], "is_image")
    flat = node("Reshape", [is_image, constant(f"{MERGE}/all", np.array([-1], np.int64))], "flat")
    counted = node("CumSum", [node("Cast", [flat], "marks", to=ir.DataType.INT64), zero], "counted")
    place = node("Max", [node("Sub", [counted, one], "before"), zero], "place")
    rows = node("Reshape", [features, constant(f"{MERGE}/row", np.array([-1, width], np.int64))], "rows")
    spare = constant(f"{MERGE}/spare", np.zeros((1, width), np.float32))  # without images there must be a row to gather
    gathered = node("Gather", [node("Concat", [rows, spare], "table", axis=0), place], "gathered", axis=0)
    shaped = node("Reshape", [gathered, node("Shape", [embeds], "shape")], "shaped")
    last = constant(f"{MERGE}/last", np.array([-1], np.int64))
    output = node("Where", [node("Unsqueeze", [is_image, last], "where"), shaped, embeds], "embeds")
    output.type, output.shape = embeds.type, embeds.shape
    embeds.name, output.name = f"{MERGE}/text", embeds.name
    graph.outputs[0] = output
    return model


def describe(config: Any, files: dict[str, str]) -> dict[str, Any]:
    """genai_config.json; files: name of a graph -> its place in the folder."""
    text = config.text_config
    heads = text.num_attention_heads
    stops = text.eos_token_id
    return {
        "model": {
            "type": KIND,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": stops,
            "pad_token_id": text.pad_token_id if text.pad_token_id is not None else stops,
            "vocab_size": text.vocab_size,
            "context_length": text.max_position_embeddings,
            "image_token_id": config.image_token_id,
            "vision": {
                "filename": files["vision_encoder"],
                "inputs": {"pixel_values": "pixel_values"},
                "outputs": {"image_features": "image_features"},
            },
            "embedding": {
                "filename": files[MERGE],
                "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
                "outputs": {"inputs_embeds": "inputs_embeds"},
            },
            "decoder": {
                "filename": files["decoder_model_merged"],
                "hidden_size": text.hidden_size,
                "num_attention_heads": heads,
                "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
                "num_hidden_layers": text.num_hidden_layers,
                "head_size": getattr(text, "head_dim", None) or text.hidden_size // heads,
                "inputs": {
                    "inputs_embeds": "inputs_embeds",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": text.max_position_embeddings,
            "past_present_share_buffer": False,
        },
    }
