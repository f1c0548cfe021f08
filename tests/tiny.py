"""Tiny random models of every supported family, with processors, for tests: no download, a second to build.

Weights are drawn large enough that no component is near zero: transformers' own defaults leave BLIP-2's vision
tower at 1e-10 and its query tokens at 0, which would hide any fault in them.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

VARIANTS = ("blip2-opt", "blip2-t5", "llava-llama", "llava-mistral", "llava-qwen2")
DECODERS = tuple(variant for variant in VARIANTS if variant != "blip2-t5")  # those without an encoder
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    "question",
    "answer",
    "user",
    "assistant",
    ":",
    "?",
    ".",
    "what",
    "is",
    "the",
    "colour",
    "of",
    "how",
    "many",
    "are",
    "there",
    "a",
    "photo",
    "describe",
    "image",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "yes",
    "no",
    "0",
    "1",
    "2",
)
VOCABULARY = 64
IMAGE = 16  # pixels a side
PATCH = 4
QUERIES = 4


def _text(kind: type, **options: object) -> object:
    return kind(
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )


def _llama_like(kind: type, **options: object) -> object:
    return _text(kind, hidden_size=64, intermediate_size=128, **options)


def _flan_t5() -> T5Config:
    """As Flan-T5: a gated GELU, an output head of its own, and heads that together are not as wide as the stream."""
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_ff=128,
        d_kv=16,
        num_heads=8,
        num_layers=3,  # transformers makes a cache of as many layers, so the decoder cannot have more
        num_decoder_layers=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )


def config(variant: str) -> Blip2Config | LlavaConfig:
    """The configuration of one of VARIANTS: hidden 64, MLP 128, two or three layers a component."""
    if variant.startswith("blip2"):
        vision = Blip2VisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE,
            patch_size=PATCH,
            initializer_range=0.05,
        )
        qformer = Blip2QFormerConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            encoder_hidden_size=64,
            cross_attention_frequency=2,
        )
        text = (
            _flan_t5()
            if variant == "blip2-t5"
            else _text(OPTConfig, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128)
        )
        made = Blip2Config(
            vision_config=vision,
            qformer_config=qformer,
            text_config=text,
            num_query_tokens=QUERIES,
            image_token_index=4,
        )
        made.image_token_id = 4
        return made
    # Three vision layers, of which the last is never read: vision_feature_layer is -2.
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = {
        "llava-llama": lambda: _llama_like(LlamaConfig, num_key_value_heads=4),  # v -> o can be folded
        "llava-mistral": lambda: _llama_like(MistralConfig, num_key_value_heads=2, sliding_window=None),
        "llava-qwen2": lambda: _llama_like(Qwen2Config, num_key_value_heads=2),  # biases on q, k, v
    }[variant]()
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE // PATCH) ** 2,
    )


def tiny(variant: str, seed: int = 0) -> nn.Module:
    """A random model of the variant, float32, in evaluation mode, on the CPU."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config(variant)).eval()
    if variant == "blip2-t5":  # transformers ties every T5's head, and lets go of it where the checkpoint has one
        model.all_tied_weights_keys.pop("language_model.lm_head.weight")
        model.language_model.lm_head.weight = nn.Parameter(torch.empty(VOCABULARY, 64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                spread = 0.3 if name.endswith("weight") else 0.1
                parameter.add_(torch.randn_like(parameter) * spread)
            elif parameter.ndim > 1:
                parameter.copy_(
                    torch.randn_like(parameter) * (0.5 if "query_tokens" in name or "attention_bias" in name else 0.12)
                )
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_new_tokens=8)
    return model


def forward_inputs(variant: str, inputs: dict) -> dict:
    """A processor's inputs, and for an encoder-decoder the beginning of an answer, which its forward asks for."""
    if variant != "blip2-t5":
        return dict(inputs)
    answers = torch.tensor([[0, 25, 30, 11]]).expand(len(inputs["input_ids"]), -1)
    return {**inputs, "decoder_input_ids": answers}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    words |= {f"w{index}": index for index in range(len(words), VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    from tokenizers import normalizers

    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=["<image>"],
    )


def processor(variant: str) -> Blip2Processor | LlavaProcessor:
    if variant.startswith("blip2"):
        return Blip2Processor(
            BlipImageProcessorPil(size={"height": IMAGE, "width": IMAGE}), tokenizer(), num_query_tokens=QUERIES
        )
    images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
    return LlavaProcessor(
        images, tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def tiny_folder(variant: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float16) -> Path:
    """The tiny model saved as a checkpoint a user would have: half precision, tokenizer and processor beside it."""
    model = tiny(variant, seed).to(dtype)
    model.save_pretrained(folder)
    if variant == "blip2-t5":  # as the Hub has it; transformers writes true, which would scale what the head reads
        file = folder / "config.json"
        content = json.loads(file.read_text())
        content["text_config"]["tie_word_embeddings"] = content["text_config"].pop("scale_decoder_outputs")
        file.write_text(json.dumps(content, indent=2))
    processor(variant).save_pretrained(folder)
    return folder
