"""Make what every quantizer is given: a random LLaVA, calibration samples and held-out ones, and their tensors.

    python benchmarks/peers/inputs.py FOLDER LAYERS

| in FOLDER                 | what                                                                                     |
|---------------------------|------------------------------------------------------------------------------------------|
| `checkpoint/`             | LLaVA, fp32: Llama 1024 x LAYERS with a 2816 wide MLP, CLIP 512 x 8, 8192 words        |
| `language/`               | its Llama alone, for tools that take no LLaVA                                            |
| `calibration/`            | a .jsonl and pictures, which vlmq reads                                                  |
| `calibration.safetensors` | what vlmq makes of them: input_ids, attention_mask, pixel_values; and `language_ids`     |
| `heldout.safetensors`     | the same of other samples                                                                |

So that the Llama alone reads exactly what it reads inside LLaVA, the projected image features of the calibration
samples are further rows of its embedding, which `language_ids` name where `input_ids` have the image token.

Weights are normal with variance 1 / columns. Two things are as in trained models, since methods live by them: token
embeddings are correlated (most of them lies in 64 directions), and channels differ in size (log-normal norms).
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmq.exporter.calibration import prepare, vision_tokens
from vlmq.exporter.families import family_of
from vlmq.exporter.sources import read

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VOCABULARY = 8192
SIDE, PATCH = 112, 14  # pixels: 64 image tokens
SAMPLES, LENGTH = 16, 128  # tokens of a sample, image tokens included
DIRECTIONS = 64


def config(layers: int) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=8,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=512,
        ),
        text_config=LlamaConfig(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=layers,
            num_attention_heads=16,
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
            **TOKENS,
        ),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


@torch.no_grad()
def model(layers: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration(config(layers)).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("embed_tokens.weight"):
            shared = torch.randn(VOCABULARY, DIRECTIONS) @ torch.randn(DIRECTIONS, parameter.shape[1])
            parameter.copy_(shared / DIRECTIONS**0.5 + 0.5 * torch.randn_like(parameter))
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(torch.exp(0.5 * torch.randn_like(parameter)))
        elif parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * torch.randn_like(parameter))
    made.generation_config = GenerationConfig(**TOKENS)
    return made


def processor() -> LlavaProcessor:
    words = {word: index for index, word in enumerate((*SPECIAL, *(f"w{n}" for n in range(len(SPECIAL), VOCABULARY))))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=["<image>"],
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def write_samples(folder: Path, seed: int) -> None:
    """Smooth random pictures, each with words of which few are frequent and most are rare."""
    folder.mkdir()
    draw, colours = random.Random(seed), np.random.default_rng(seed)
    words = range(len(SPECIAL), VOCABULARY)
    frequencies = [1 / (1 + rank) for rank in range(len(words))]
    lines = []
    for index in range(SAMPLES):
        coarse = Image.fromarray(colours.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        text = draw.choices(words, frequencies, k=LENGTH - (SIDE // PATCH) ** 2)
        prompt = " ".join(["<image>", *(f"w{word}" for word in text)])
        lines.append(json.dumps({"id": index, "image": f"{index}.png", "prompt": prompt}))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")


@torch.no_grad()
def language_alone(llava: LlavaForConditionalGeneration, tensors: dict[str, Tensor]) -> tuple[LlamaForCausalLM, Tensor]:
    """The Llama with image features as further rows of its embedding, and the ids (samples, length) that name them."""
    features = llava.model.get_image_features(pixel_values=tensors["pixel_values"]).pooler_output
    rows = torch.cat(list(features))
    text = LlamaConfig(**{**llava.config.text_config.to_dict(), "vocab_size": VOCABULARY + len(rows)})
    alone = LlamaForCausalLM(text).eval()
    alone.model.load_state_dict(
        llava.model.language_model.state_dict()
        | {"embed_tokens.weight": torch.cat([llava.get_input_embeddings().weight, rows])}
    )
    alone.lm_head.weight.copy_(torch.cat([llava.lm_head.weight, torch.zeros_like(rows)]))
    ids = tensors["input_ids"].clone()
    ids[vision_tokens(tensors, llava.config)] = VOCABULARY + torch.arange(len(rows))
    found, expected = alone.model(ids).last_hidden_state, llava.model(**tensors).last_hidden_state
    if (found - expected).norm() > 1e-4 * expected.norm():
        raise SystemExit("the Llama alone does not read what it reads inside LLaVA")
    return alone, ids


def main() -> None:
    folder, layers = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True)
    llava, reads = model(layers), processor()
    llava.save_pretrained(folder / "checkpoint")
    reads.save_pretrained(folder / "checkpoint")
    for seed, name in enumerate(("calibration", "heldout")):
        write_samples(folder / name, seed)
        (tensors,) = prepare(read(folder / name, None).samples, reads, family_of(llava.config))
        if name == "calibration":
            alone, ids = language_alone(llava, tensors)
            alone.save_pretrained(folder / "language")
            reads.tokenizer.save_pretrained(folder / "language")
            tensors["language_ids"] = ids
        save_file(tensors, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
