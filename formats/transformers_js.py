"""What transformers.js needs beside the graphs, so that `from_pretrained(folder)` needs no options.

    config.json                `transformers.js_config`: the precision that files are named for, which have data beside
    preprocessor_config.json   the image processor, which transformers 5 keeps inside processor_config.json
    processor_config.json      for LLaVA: how many image tokens there are, said in the one way both readers count alike

Read by transformers.js 4.3, which knows LLaVA; a BLIP-2 runs there as `llava` once its image tokens are written out.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmq.formats.errors import FormatError

DECODER = "decoder_model_merged"
KEY = "transformers.js_config"
# what a file name ends in, before .onnx -> its name there
DTYPES = {
    "": "fp32",
    "_fp16": "fp16",
    "_quantized": "q8",
    "_q4": "q4",
    "_q4f16": "q4f16",
    "_q2": "q2",
    "_q2f16": "q2f16",
}


def complete(folder: Path) -> list[Path]:
    """Write what is missing into a folder that holds onnx/, config.json and the processor; the files written."""
    made = additions(folder, _read(folder / "config.json"), folder / "onnx")
    for name, content in made.items():
        (folder / name).write_text(as_text(content), encoding="utf-8")
    return [folder / name for name in made]


def additions(source: Path, config: Mapping[str, Any], onnx: Path) -> dict[str, dict[str, Any]]:
    """File -> what it says in a folder with these graphs, made from a source's processor and the config.json."""
    graphs = sorted(path.name for path in onnx.glob("*.onnx"))
    decoder = next((name for name in graphs if name.startswith(DECODER)), None)
    if decoder is None:
        raise FormatError(f"{onnx}: no {DECODER}*.onnx; export with --format onnx or both")
    dtype = DTYPES[decoder.removeprefix(DECODER).removesuffix(".onnx")]
    outside = {name: 1 for name in graphs if (onnx / f"{name}_data").exists()}
    made = {"config.json": {**config, KEY: {"dtype": dtype, "use_external_data_format": outside}}}
    processor = _read(source / "processor_config.json")
    images = processor.get("image_processor") or _read(source / "preprocessor_config.json")
    if images and config.get("model_type") == "llava":
        processor = {**processor, "processor_class": "LlavaProcessor", **_image_tokens(config, processor)}
        made["processor_config.json"] = processor
    if images:
        named = {"processor_class": processor["processor_class"]} if "processor_class" in processor else {}
        made["preprocessor_config.json"] = {**images, **named}
    return made


def as_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _image_tokens(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    """transformers counts patches + additional tokens, less one where the strategy is `default`; transformers.js never
    takes one away. Where that one is the class token, none is additional and the strategy says that all are there."""
    vision = config.get("vision_config", {})
    strategy = processor.get("vision_feature_select_strategy") or config.get(
        "vision_feature_select_strategy", "default"
    )
    additional = processor.get("num_additional_image_tokens")
    if additional is None:
        additional = 1 if vision.get("model_type") == "clip_vision_model" else 0
    return {
        "image_token": processor.get("image_token", "<image>"),
        "patch_size": processor.get("patch_size") or vision.get("patch_size"),
        "num_additional_image_tokens": additional - 1 if strategy == "default" else additional,
        "vision_feature_select_strategy": "full",
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
