"""The graphs of an encoder-decoder language model, in place of the one decoder of others.

    Encoder    inputs_embeds (batch, encoder sequence, width),        -> cross keys and values of every decoder block
               encoder_attention_mask (batch, encoder sequence)          (batch, heads, encoder sequence, d)
    Decoder    inputs_embeds (batch, sequence, width),                -> logits, present keys and values
               encoder_attention_mask, past and cross keys, values       (batch, heads, past + sequence, d)

The keys and values that the decoder's blocks make of the question are computed once, where the encoder ends: a step of
the decoder only reads them. A past of length 0 is allowed, so one decoder begins an answer and continues it. All
answers of a batch begin at the same place, so the decoder has no mask and no positions of its own.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from vlmq.formats.errors import FormatError
from vlmq.formats.onnx_modules import Part

ENCODER = "encoder_model"
MASK = "encoder_attention_mask"
READ, ASKED = {0: "batch_size", 1: "encoder_sequence_length"}, {0: "batch_size", 2: "encoder_sequence_length"}


class Speaking(Part):
    """What the two graphs have in common: the blocks of the decoder, and the names of what each remembers."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.layers = self.text.num_decoder_layers
        self.cross = tuple(f"{layer}.encoder.{part}" for layer in range(self.layers) for part in ("key", "value"))
        self.said = tuple(f"{layer}.decoder.{part}" for layer in range(self.layers) for part in ("key", "value"))

    @property
    def language(self) -> Any:
        return self.vlm.language_model

    def slots(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """Zeros of their own for every block: one tensor twice would be traced as one input."""
        shape = (2, self.text.num_heads, length, self.text.d_kv)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(self.layers)]


class Encoder(Speaking):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.inputs = ("inputs_embeds", MASK)
        self.outputs = tuple(f"present.{slot}" for slot in self.cross)

    def forward(self, inputs_embeds: Tensor, encoder_attention_mask: Tensor) -> list[Tensor]:
        encoder = self.language.encoder
        hidden = encoder(inputs_embeds=inputs_embeds, attention_mask=encoder_attention_mask).last_hidden_state
        attentions = [block.layer[1].EncDecAttention for block in self.language.decoder.block]
        made = [linear(hidden) for attention in attentions for linear in (attention.k, attention.v)]
        return [each.unflatten(-1, (-1, self.text.d_kv)).transpose(1, 2) for each in made]

    def example(self) -> tuple:
        return torch.zeros(2, 5, self.text.d_model), torch.ones(2, 5, dtype=torch.long)

    def dynamic(self) -> tuple:
        return READ, READ


class Decoder(Speaking):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        past = (f"past_key_values.{slot}" for slot in (*self.said, *self.cross))
        self.inputs = ("inputs_embeds", MASK, *past)
        self.outputs = ("logits", *(f"present.{slot}" for slot in self.said))

    def forward(
        self,
        inputs_embeds: Tensor,
        encoder_attention_mask: Tensor,
        past: list[tuple[Tensor, Tensor]],
        cross: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[Tensor]]:
        said: Any = DynamicCache(past)
        cache = EncoderDecoderCache(said, DynamicCache(cross))
        cache.is_updated = dict.fromkeys(range(self.layers), True)
        # Its length alone is read where keys and values are known.
        read = cross[0][1].transpose(1, 2).flatten(2)
        named = "cache" if "cache" in signature(self.language.forward).parameters else "past_key_values"
        logits = self.language(
            encoder_outputs=(read,),
            attention_mask=encoder_attention_mask,
            decoder_inputs_embeds=inputs_embeds,
            use_cache=True,
            **{named: cache},
        ).logits
        return logits, [part for layer in said.layers for part in (layer.keys, layer.values)]

    def example(self) -> tuple:
        mask = torch.ones(2, 5, dtype=torch.long)
        return torch.zeros(2, 3, self.text.d_model), mask, self.slots(4), self.slots(5)

    def dynamic(self) -> tuple:
        past = {0: "batch_size", 2: "past_sequence_length"}
        step = {0: "batch_size", 1: "sequence_length"}
        return step, READ, [(past, past)] * self.layers, [(ASKED, ASKED)] * self.layers


def refuse(model: PreTrainedModel) -> None:
    """FormatError where encoder and decoder look tokens up in tables of their own: one graph serves both."""
    language: Any = model.get_submodule("language_model")
    shared = language.shared
    for stack in (language.encoder, language.decoder):
        table = stack.embed_tokens
        if table is not shared and table.weight is not shared.weight and not torch.equal(table.weight, shared.weight):
            raise FormatError("language_model: its encoder and decoder have embeddings of their own; no graph has two")
