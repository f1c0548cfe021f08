"""What transformers.js needs beside the graphs, so that `from_pretrained(folder)` needs no options.

    config.json                `transformers.js_config`: the precision that files are named for, which have data beside
    preprocessor_config.json   the image processor, which transformers 5 keeps inside processor_config.json
    processor_config.json      for LLaVA: how many image tokens there are, said in the one way both readers count alike

Read by transformers.js 4.3, which knows LLaVA; a BLIP-2 runs there as `llava` once its image tokens are written out.
"""

import json
from pathlib import Path
from typing import Any

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
    config = _read(folder / "config.json")
    graphs = sorted(path.name for path in (folder / "onnx").glob("*.onnx"))
    suffix = next(name for name in graphs if name.startswith("decoder_model_merged")).removesuffix(".onnx")
    dtype = DTYPES[suffix.removeprefix("decoder_model_merged")]
    outside = {name: 1 for name in graphs if (folder / "onnx" / f"{name}_data").exists()}
    written = [_write(folder / "config.json", {**config, KEY: {"dtype": dtype, "use_external_data_format": outside}})]
    processor = _read(folder / "processor_config.json")
    images = _read(folder / "preprocessor_config.json") or processor.get("image_processor", {})
    if images and config.get("model_type") == "llava":
        processor = {**processor, "processor_class": "LlavaProcessor", **_image_tokens(config, processor)}
        written.append(_write(folder / "processor_config.json", processor))
    if images:
        named = {"processor_class": processor["processor_class"]} if "processor_class" in processor else {}
        written.append(_write(folder / "preprocessor_config.json", {**images, **named}))
    return written


def _image_tokens(config: dict[str, Any], processor: dict[str, Any]) -> dict[str, Any]:
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


def _write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
