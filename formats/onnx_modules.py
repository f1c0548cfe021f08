"""The three parts of a vision-language model that become graphs, each as a module with tensors in and out.

    VisionEncoder   pixel_values (batch, 3, height, width)                 -> image_features (batch, tokens, width)
    EmbedTokens     input_ids (batch, sequence)                            -> inputs_embeds (batch, sequence, width)
    Decoder         inputs_embeds, attention_mask (batch, past + sequence),
                    position_ids (batch, sequence), past keys and values   -> logits, present keys and values

A past of length 0 is allowed, so one decoder serves prompt and continuation. Names of inputs and outputs are those
that transformers.js and onnxruntime-genai look for. Each module holds the whole model under `vlm`, so a weight is
called `vlm.` and its name in the model; weights of other parts are dropped from the graph.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from vlmq.formats.errors import FormatError

MODEL = "vlm"


# mypy sees transformers' models through nn.Module.__getattr__, which may be a Tensor: hence Any.
def blip2_image_features(model: Any, pixel_values: Tensor) -> Tensor:
    """Vision tower, Q-Former, projection: (batch, 3, height, width) -> (batch, queries, width)."""
    return model.get_image_features(pixel_values, return_dict=True).pooler_output


def llava_image_features(model: Any, pixel_values: Tensor) -> Tensor:
    """CLIP as far as its features are read, then the projector: (batch, 3, height, width) -> (batch, patches, width).

    LLaVA reads hidden layer -2, so CLIP's last block never matters; transformers computes it, and returns a list
    over the batch, which would fix the batch size of the graph.
    """
    llava, config = model.model, model.config
    tower = llava.vision_tower
    wanted = config.vision_feature_layer
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    blocks = len(tower.encoder.layers)
    wanted = [layer % (blocks + 1) for layer in wanted]  # hidden layer 0 is the embedding

    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
    read = {0: hidden}
    for number, block in enumerate(tower.encoder.layers[: max(wanted)], start=1):
        hidden = block(hidden, attention_mask=None)
        read[number] = hidden
    first = 1 if config.vision_feature_select_strategy == "default" else 0  # leaves out the class token
    return llava.multi_modal_projector(torch.cat([read[layer][:, first:] for layer in wanted], dim=-1))


@dataclass(frozen=True)
class Parts:
    """Where a family keeps what the graphs are made of."""

    image_features: Callable[[Any, Tensor], Tensor]
    language: str  # from hidden states to hidden states, with a cache
    head: str  # from hidden states to logits
    vision: str  # configuration attribute
    towers: tuple[str, ...]  # vision towers whose layout `image_features` knows


PARTS = {
    "blip-2": Parts(
        blip2_image_features,
        "language_model.model",
        "language_model.lm_head",
        "vision_config",
        ("blip_2_vision_model",),
    ),
    "llava": Parts(llava_image_features, "model.language_model", "lm_head", "vision_config", ("clip_vision_model",)),
}


def parts_of(model: PreTrainedModel) -> Parts:
    """The family's entry; FormatError where no graph can be made of the model."""
    kind = model.config.model_type
    if kind not in PARTS:
        raise FormatError(f"{kind}: no ONNX graphs for this family; choose --format safetensors")
    parts = PARTS[kind]
    tower = getattr(model.config, parts.vision).model_type
    if tower not in parts.towers:
        raise FormatError(f"{kind}: no ONNX graph for a {tower}; choose --format safetensors")
    return parts


class Part(nn.Module, ABC):
    """One graph: example inputs, their names and dynamic dimensions, and the forward that is traced."""

    vlm: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.parts = parts_of(model)
        self.add_module(MODEL, model)
        self.text = model.config.text_config
        self.vision = getattr(model.config, self.parts.vision)
        self.embedding: Any = [model.get_input_embeddings()]  # in a list: its name is the one inside the model

    @abstractmethod
    def example(self) -> tuple:
        """Inputs to trace with: no two of them the same tensor, no dimension by chance equal to another."""

    @abstractmethod
    def dynamic(self) -> tuple:
        """The names of the dimensions that may vary, for every input."""


class VisionEncoder(Part):
    inputs = ("pixel_values",)
    outputs = ("image_features",)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.parts.image_features(self.vlm, pixel_values)

    def example(self) -> tuple:
        side = self.vision.image_size
        return (torch.zeros(2, 3, side, side, dtype=self.vlm.dtype),)

    def dynamic(self) -> tuple:
        return ({0: "batch_size"},)


class EmbedTokens(Part):
    inputs = ("input_ids",)
    outputs = ("inputs_embeds",)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embedding[0](input_ids)

    def example(self) -> tuple:
        return (torch.zeros(2, 3, dtype=torch.long),)

    def dynamic(self) -> tuple:
        return ({0: "batch_size", 1: "sequence_length"},)


class Decoder(Part):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.layers = self.text.num_hidden_layers
        slots = [f"{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]
        past = (f"past_key_values.{slot}" for slot in slots)
        self.inputs = ("inputs_embeds", "attention_mask", "position_ids", *past)
        self.outputs = ("logits", *(f"present.{slot}" for slot in slots))

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        cache: Any = DynamicCache(past)
        hidden = self.vlm.get_submodule(self.parts.language)(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = self.vlm.get_submodule(self.parts.head)(hidden)
        return logits, [part for layer in cache.layers for part in (layer.keys, layer.values)]

    def example(self) -> tuple:
        batch, sequence, past = 2, 3, 4
        heads = getattr(self.text, "num_key_value_heads", None) or self.text.num_attention_heads
        width = getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads

        def slot() -> Tensor:
            return torch.zeros(
                batch, heads, past, width, dtype=self.vlm.dtype
            )  # one tensor twice would be traced as one input

        return (
            torch.zeros(batch, sequence, self.embedding[0].embedding_dim, dtype=self.vlm.dtype),
            torch.ones(batch, past + sequence, dtype=torch.long),
            torch.arange(past, past + sequence).expand(batch, -1),
            [(slot(), slot()) for _ in range(self.layers)],
        )

    def dynamic(self) -> tuple:
        step = {0: "batch_size", 1: "sequence_length"}
        slot = {0: "batch_size", 2: "past_sequence_length"}
        return step, {0: "batch_size", 1: "total_sequence_length"}, step, [(slot, slot)] * self.layers


LOOKING: dict[str, type[Part]] = {"vision_encoder": VisionEncoder, "embed_tokens": EmbedTokens}
DECODER = "decoder_model_merged"
