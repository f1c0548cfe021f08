"""BLIP-2's image-text retrieval: features of images and of texts, and how well one matches the other.

Li et al., "BLIP-2", section 3.1: the image-text contrastive similarity is that of the closest query, and the
image-text matching head looks at a picture and a text together. What transformers' `Blip2ForImageTextRetrieval` does
for one batch is taken apart here, so that each image and each text passes through the model once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, Blip2ForImageTextRetrieval

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.runtime import open_processor

if TYPE_CHECKING:
    from PIL.Image import Image

ARCHITECTURE = "Blip2ForImageTextRetrieval"
MAX_TOKENS = 35  # of a text, as in the paper's evaluation


class Retriever:
    """A retrieval model in PyTorch, float32, and its processor."""

    def __init__(self, model: Blip2ForImageTextRetrieval, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor
        processor.tokenizer.padding_side = "right"  # a text's feature is that of its first token

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image]) -> np.ndarray:
        """(n, queries, width), each of length 1."""
        model, seen = self.model, self._seen(images)
        queries = model.query_tokens.expand(len(seen), -1, -1)
        found = model.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        return normalize(model.vision_projection(found), dim=-1).numpy()

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """(n, width), each of length 1."""
        model = self.model
        tokens, mask = self._tokens(texts)
        embeds = model.embeddings(input_ids=tokens)
        found = model.qformer(query_embeds=embeds, query_length=0, attention_mask=mask).last_hidden_state
        return normalize(model.text_projection(found[:, 0]), dim=-1).numpy()

    @torch.inference_mode()
    def matches(self, image: Image, texts: Sequence[str]) -> np.ndarray:
        """(n,): the matching head's logit that the image and each text belong together."""
        model = self.model
        tokens, mask = self._tokens(texts)
        seen = self._seen([image]).expand(len(texts), -1, -1)
        queries = model.query_tokens.expand(len(texts), -1, -1)
        count = queries.shape[1]
        found = model.qformer(
            query_embeds=model.embeddings(input_ids=tokens, query_embeds=queries),
            query_length=count,
            attention_mask=torch.cat([mask.new_ones(len(texts), count), mask], dim=1),
            encoder_hidden_states=seen,
        ).last_hidden_state
        return model.itm_head(found[:, :count]).mean(dim=1)[:, 1].numpy()

    def _seen(self, images: Sequence[Image]) -> Tensor:
        pixels = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        return self.model.vision_model(pixel_values=pixels).last_hidden_state

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"]


def open_retriever(folder: Path) -> Retriever:
    """VlmqError unless the folder holds a retrieval model, whole."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if ARCHITECTURE not in (config.architectures or ()):
        raise VlmqError(
            f"{folder}: is no {ARCHITECTURE}; name a checkpoint with its heads, as blip2-itm-vit-g has them"
        )
    try:
        loaded: Any = Blip2ForImageTextRetrieval.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except OSError as fault:
        raise VlmqError(f"{folder}: cannot be loaded ({' '.join(str(fault).split())}); get it again") from None
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise VlmqError(f"{folder}: {missing[0]} and {len(missing) - 1} more tensors are absent; get it again")
    return Retriever(model, open_processor(folder))
