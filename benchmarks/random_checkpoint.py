"""A checkpoint of a true shape with random weights: what an export of it costs does not depend on what it knows.

    python benchmarks/random_checkpoint.py llava-1.5-7b FOLDER [--scale 0.25] [--blocks 2]

Shapes are those of `Salesforce/blip2-opt-2.7b` and `llava-hf/llava-1.5-7b-hf`. Weights are normal with variance
1 / columns and norms are 1, so that activations keep their size from block to block and nothing overflows in half
precision. Tensors are drawn, in fp16, and written one by one, into shards, under the names that checkpoints on the Hub
have. The tokenizer is the demos', a word a token: of the vocabulary's embeddings the rest is never read.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2Processor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmq.exporter.demo.models import IMAGE, IMAGE_TOKEN, NORMALISE, TOKENS, build_tokenizer, generation_config
from vlmq.exporter.skeleton import skeleton
from vlmq.formats.folder import staged
from vlmq.formats.shards import SafetensorsWriter

PATCH = 14
POSITIONS = 2048
SLAB = 2**22  # numbers drawn at once
ON_DISK = (  # of LLaVA; BLIP-2 has the same names in memory and on disk
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
)


@dataclass(frozen=True)
class Size:
    """How much of a true shape is built: `scale` of widths, heads and layers, and the first `blocks` layers."""

    scale: float = 1.0
    blocks: int | None = None

    def part(self, hidden: int, mlp: int, heads: int, layers: int) -> dict[str, int]:
        """One transformer's sizes; widths are multiples of 128, which groups of 64 and of 128 divide."""
        width = self._width(hidden)
        fitting = [count for count in range(1, heads + 1) if width % count == 0 and width // count % 2 == 0]
        layers = max(2, round(layers * self.scale))
        return {
            "hidden_size": width,
            "mlp": self._width(mlp),
            "num_attention_heads": min(fitting, key=lambda count: abs(count - heads * self.scale)),
            "num_hidden_layers": layers if self.blocks is None else min(layers, self.blocks),
        }

    def _width(self, width: int) -> int:
        return max(128, round(width * self.scale / 128) * 128)


def _mlp(sizes: dict[str, int], name: str = "intermediate_size") -> dict[str, Any]:
    return {name if key == "mlp" else key: value for key, value in sizes.items()}


def _blip2(size: Size) -> Blip2Config:
    vision = size.part(1408, 6144, 16, 39)
    text = size.part(2560, 10240, 32, 32)
    return Blip2Config(
        vision_config={**_mlp(vision), "image_size": 224, "patch_size": PATCH},
        qformer_config={
            **_mlp(size.part(768, 3072, 12, 12)),
            "vocab_size": 30523,
            "encoder_hidden_size": vision["hidden_size"],
            "cross_attention_frequency": 2,
        },
        text_config=OPTConfig(
            **_mlp(text, "ffn_dim"),
            vocab_size=50304,
            word_embed_proj_dim=text["hidden_size"],
            max_position_embeddings=POSITIONS,
            **TOKENS,
        ),
        num_query_tokens=32,
        image_token_index=IMAGE,
        tie_word_embeddings=True,  # type: ignore[call-arg]  # every configuration takes it
    )


def _llava(size: Size) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            **_mlp(size.part(1024, 4096, 16, 24)), image_size=336, patch_size=PATCH, projection_dim=768
        ),
        text_config=LlamaConfig(
            **_mlp(size.part(4096, 11008, 32, 32)), vocab_size=32064, max_position_embeddings=POSITIONS, **TOKENS
        ),
        image_token_index=IMAGE,
        image_seq_length=(336 // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = POSITIONS
    return tokenizer


def _blip2_processor() -> Blip2Processor:
    images = BlipImageProcessorPil(size={"height": 224, "width": 224}, **NORMALISE)
    return Blip2Processor(images, _tokenizer(), num_query_tokens=32)


def _llava_processor() -> LlavaProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, **NORMALISE)
    return LlavaProcessor(
        images,
        _tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
    )


SHAPES = {"blip2-opt-2.7b": (_blip2, _blip2_processor), "llava-1.5-7b": (_llava, _llava_processor)}


def make(shape: str, folder: Path, size: Size = Size(), seed: int = 0, shard_bytes: int = 2 * 10**9) -> int:
    """Write the checkpoint into `folder`, which must not exist yet; how many bytes its weights are."""
    configure, processor = SHAPES[shape]
    config = configure(size)
    config.dtype = torch.float16
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForConditionalGeneration"]
    generator = torch.Generator().manual_seed(seed)
    with staged(folder) as stage:
        writer = SafetensorsWriter(stage, shard_bytes)
        for name, wanted in _parameters(config).items():
            writer.add({_on_disk(name, config): _draw(name, wanted, generator)})
        writer.close()
        config.save_pretrained(stage)
        generation_config().save_pretrained(stage)
        processor().save_pretrained(stage)
    return writer.total


def _parameters(config: PretrainedConfig) -> dict[str, torch.Size]:
    """The shape of every parameter by its name in memory; a tied head is not one."""
    return {name: parameter.shape for name, parameter in skeleton(config).named_parameters()}


def _on_disk(name: str, config: PretrainedConfig) -> str:
    if isinstance(config, LlavaConfig):
        for pattern, stored in ON_DISK:
            name = re.sub(pattern, stored, name)
    return name


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A tensor as trained ones are in size: fp16, drawn in slabs, so that float32 never holds all of it."""
    if "norm" in name.lower():
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.float16)
    columns = shape[1:].numel() if len(shape) == 4 else shape[-1]  # a convolution sums over its window too
    deviation = columns**-0.5 if len(shape) > 1 else 0.02
    drawn = torch.empty(shape, dtype=torch.float16)
    for slab in drawn.view(-1).split(SLAB):
        slab.copy_(torch.randn(len(slab), generator=generator) * deviation)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="of widths, heads and layers")
    parser.add_argument("--blocks", type=int, help="only so many layers of each transformer, 2 or more")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not 0 < options.scale <= 1 or (options.blocks or 2) < 2:
        sys.exit("random_checkpoint: --scale is above 0 and at most 1, --blocks 2 or more")
    count = make(options.shape, options.folder, Size(options.scale, options.blocks), options.seed)
    print(json.dumps({"folder": str(options.folder), "bytes": count}))


if __name__ == "__main__":
    main()
