"""A folder's tokenizer and image processor: what is asked, as tokens and pixels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmq.exporter.errors import VlmqError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin


def open_processor(folder: Path) -> "ProcessorMixin":
    """The tokenizer and image processor of a folder.

    Always the PIL one: torchvision's resizes a little differently, and answers would depend on what is installed.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VlmqError(f"{folder}: no usable tokenizer and image processor ({what}); copy the model's own") from error
    _complete(processor, read_json(folder / "config.json"))
    return processor


def _complete(processor: "ProcessorMixin", config: dict[str, Any]) -> None:
    """What older processors leave out, from the model's config: without it prompts have no place for their image."""
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    known: dict[str, Any] = {"num_query_tokens": config.get("num_query_tokens")}
    vision = config.get("vision_config", {})
    if config.get("model_type") == "llava":
        strategy = config.get("vision_feature_select_strategy", "default")
        # A processor that leaves no token out where the model does has it left out of its count (transformers_js.py).
        counts = strategy == "default" and getattr(processor, "vision_feature_select_strategy", None) == "full"
        known = {
            "patch_size": vision.get("patch_size"),
            "vision_feature_select_strategy": strategy,
            # CLIP's class token; absent in processors that were saved before transformers counted it.
            "num_additional_image_tokens": 1
            if vision.get("model_type") == "clip_vision_model" and not counts
            else None,
        }
    for name, value in known.items():
        if value is not None and not getattr(processor, name, None):
            setattr(processor, name, value)


def encode(processor: "ProcessorMixin", images: Sequence["Image"], prompts: Sequence[str], kind: str) -> Any:
    """input_ids and attention_mask (n, sequence), padded; pixel_values (n, 3, height, width)."""
    if not images:
        return processor(text=list(prompts), padding=True, return_tensors=kind)
    try:
        encoded = processor(images=list(images), text=list(prompts), padding=True, return_tensors=kind)
    except ValueError as error:  # the processor's own check of prompts against images
        raise VlmqError(f"prompts: {error}; every prompt needs its image's placeholder exactly once") from error
    for prompt, tokens in zip(prompts, np.asarray(encoded["input_ids"]), strict=True):
        check_image_tokens(processor, prompt, tokens)
    return encoded


def check_image_tokens(processor: Any, prompt: str, tokens: np.ndarray) -> None:
    """Refuse an encoded prompt (sequence,) without a place for its image: BLIP-2 would answer blindly."""
    mark = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
    if not (tokens == mark).any():
        raise VlmqError(f"{prompt!r}: has no place for the image; write {processor.image_token} where it belongs")


def pad_outside(processor: "ProcessorMixin", has_encoder: bool) -> None:
    """Pad on the left, where generation goes on from the last token of what was asked; for an encoder on the right:
    BLIP-2's processor puts the image's tokens before the padding, and T5 counts the distance between any two tokens."""
    processor.tokenizer.padding_side = "right" if has_encoder else "left"


def padding(processor: "ProcessorMixin") -> int:
    """The token that fills a batch up."""
    tokenizer = processor.tokenizer
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def stop_tokens(*places: int | list[int] | None) -> set[int]:
    """The end-of-sequence tokens, from the first place that names any."""
    for named in places:
        if named is not None:
            return {named} if isinstance(named, int) else set(named)
    return set()


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
