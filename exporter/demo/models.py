"""The two demo models: their configurations, processors and prompts, and how each turns pixels into image tokens.

They have every part that their large namesakes have, at the same names and with the same functions between, so what
exports them exports the large ones: BLIP-2 with a fused qkv, Q-Former and OPT; LLaVA with CLIP, a two-layer projector
and a Llama of grouped-query attention. Widths are multiples of 128, which groups of 64 and of 128 divide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmq.exporter.demo.questions import words
from vlmq.exporter.demo.world import SIDE

SPECIAL: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
IMAGE_TOKEN = "<image>"
VOCABULARY = {word: index for index, word in enumerate([*SPECIAL.values(), IMAGE_TOKEN, *words()])}
PAD, BOS, EOS, IMAGE = (VOCABULARY[word] for word in ("<pad>", "<s>", "</s>", IMAGE_TOKEN))
TOKENS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}

Model = Any  # a PreTrainedModel, whose parts a type checker cannot know

PATCH = 8
PATCHES = (SIDE // PATCH) ** 2
QUERIES = 16
# The same for training (packing.py) and for the processors: pixels in 0..255 become -1..1.
NORMALISE: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True, "do_normalize": True}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or sign of the world, in lower case; text is padded on the left."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token=SPECIAL["unk_token"]))
    backend.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL.values(), IMAGE_TOKEN)])
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)  # joins words by a space, but none before a comma
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", model_max_length=256, **SPECIAL)


def _build_blip2() -> Blip2ForConditionalGeneration:
    width: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    config = Blip2Config(
        # Its default of 1e-10 leaves a tower that is all but zero.
        vision_config={
            **width,
            "num_hidden_layers": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "initializer_range": 0.07,
        },
        qformer_config={
            **width,
            "num_hidden_layers": 3,
            "encoder_hidden_size": 128,
            "cross_attention_frequency": 2,
            "vocab_size": len(VOCABULARY),
            "initializer_range": 0.05,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=OPTConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=256,
            word_embed_proj_dim=256,
            ffn_dim=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            dropout=0.0,
            init_std=0.05,
            **TOKENS,
        ),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
        tie_word_embeddings=True,  # type: ignore[call-arg]  # every configuration takes it
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens, std=0.5)  # they start equal, at zero, and would stay equal
    return _look_for_likeness(model)


def _build_llava() -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=128,
            initializer_factor=1.0,
        ),
        text_config=LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.05,
            **TOKENS,
        ),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return _look_for_likeness(LlavaForConditionalGeneration(config))


@torch.no_grad()
def _look_for_likeness(model: Model) -> Model:
    """Start each query head of the language model as its key head, so that tokens look at what resembles them.

    Questions are answered by finding the image tokens that are like a word; from independent heads that takes thousands
    of steps to emerge, for shapes above all.
    """
    for attention in model.get_decoder().modules():
        if hasattr(attention, "q_proj"):
            query, key = attention.q_proj.weight, attention.k_proj.weight  # (heads * d, width)
            heads = key.unflatten(0, (-1, attention.head_dim))
            query.copy_(heads.repeat_interleave(len(query) // len(key), dim=0).flatten(0, 1))
    return model


def _blip2_processor() -> Blip2Processor:
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}, **NORMALISE)
    return Blip2Processor(images, build_tokenizer(), num_query_tokens=QUERIES)


def _llava_processor() -> LlavaProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **NORMALISE)
    return LlavaProcessor(
        images,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
    )


def _blip2_look(model: Model, pixels: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    vision = model.vision_model(pixels).last_hidden_state
    queries = model.query_tokens.expand(len(pixels), -1, -1)
    cells = model.qformer(query_embeds=queries, encoder_hidden_states=vision).last_hidden_state
    return vision[:, 1:], cells, model.language_projection(cells)


def _llava_look(model: Model, pixels: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    vision = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    return vision, None, model.model.multi_modal_projector(vision)


def _blip2_read(model: Model, **inputs: Tensor) -> Tensor:
    return model.language_model(**inputs).logits


def _llava_read(model: Model, **inputs: Tensor) -> Tensor:
    return model.lm_head(model.model.language_model(**inputs).last_hidden_state)


@dataclass(frozen=True)
class Demo:
    """All that differs between the two."""

    build: Callable[[], Model]  # random weights, float32
    processor: Callable[[], ProcessorMixin]
    # (model, pixels (b, 3, 64, 64)) -> patches (b, 64, 128), cells (b, 16, 128) or None, image tokens (b, n, 256)
    look: Callable[[Model, Tensor], tuple[Tensor, Tensor | None, Tensor]]
    read: Callable[..., Tensor]  # (model, inputs_embeds, attention_mask, position_ids) -> logits
    question: str  # prompt with {question}; a prompt without it is used as it is
    caption: str
    prefix: tuple[str, str]  # what stands before and after the image tokens, in every prompt
    image_tokens: int


DEMOS = {
    "blip2-mini": Demo(
        _build_blip2,
        _blip2_processor,
        _blip2_look,
        _blip2_read,
        question="Question: {question} Answer:",
        caption="a photo of",
        prefix=("", "<s>"),
        image_tokens=QUERIES,
    ),
    "llava-mini": Demo(
        _build_llava,
        _llava_processor,
        _llava_look,
        _llava_read,
        question="USER: <image>\n{question} ASSISTANT:",
        caption="USER: <image>\nDescribe the image. ASSISTANT:",
        prefix=("<s> USER:", ""),
        image_tokens=PATCHES,
    ),
}


def generation_config() -> GenerationConfig:
    return GenerationConfig(max_new_tokens=24, do_sample=False, **TOKENS)
