"""The architecture tables: where each family keeps its blocks, and what feeds every linear in them.

A family is data. A *stage* is a list of equal blocks (or one module that is a block by itself); its table says
which linears read one and the same input, and whether a scale can be folded into what comes before them. The
walk (`exporter/walk.py`) reads it, and `exporter/rotation.py` a stage's *stream* besides. All names are the in-memory
names of transformers' classes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PretrainedConfig

from vlmq.exporter.errors import VlmqError

Component = Literal["vision", "connector", "language"]
Kind = Literal["attention", "feedforward", "projection", "embedding", "head"]
COMPONENTS: tuple[Component, ...] = ("vision", "connector", "language")


@dataclass(frozen=True)
class Reads:
    """Linears that read one and the same input, and the module before them that can absorb the inverse of a scale.

    Only a norm's affine part, or a linear with nothing or ReLU or a product's other factor in between, can do so;
    `after` is None where nothing can. `part` names the stacked part of a fused projection that is meant.
    """

    linears: tuple[str, ...]
    kind: Kind
    after: str | None = None
    part: str | None = None


@dataclass(frozen=True)
class Stream:
    """The residual stream through a stage's blocks: all that writes it, and all that reads it, each through a norm.

    The norms in the blocks are those that the stage's `reads` come after; `last` is the one after the blocks, where a
    `*` stands for any block. `writers` are linears of every block; `sources` linears and convolutions, and `embeddings`
    parameters, before the blocks.
    """

    norm: Literal["layer", "rms"]
    width: int
    head: int  # channels of one head
    values: tuple[str, str]  # the linear that makes the values (its part v, if fused), and the one that reads them
    writers: tuple[str, ...] = ()  # none: the stream is written by a norm, and cannot be rotated
    sources: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    last: Reads | None = None
    tied: str | None = None  # the embedding whose weight the reader of `last` may share


@dataclass(frozen=True)
class Stage:
    """Blocks that run one after the other: their place, their table, and which linears stack several parts.

    hands_on: what a block returns after its hidden states, by the names of the arguments that the next one takes it as.
    answers: its tokens are those of the answer alone, and it sees the question through an encoder.
    """

    component: Component
    path: str
    reads: tuple[Reads, ...]
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    single: bool = False  # the module at `path` is one block, not a list of them
    live: Callable[[PretrainedConfig], int] | None = None  # how many blocks run; None: all
    stream: Stream | None = None  # None: nothing in it can be rotated
    hands_on: tuple[str, ...] = ()
    answers: bool = False


@dataclass(frozen=True)
class Family:
    """A model architecture: its stages in the order they run, and what is left in full precision, and why.

    loose_head: an output head that transformers ties to the token embedding unless the checkpoint holds one of its own;
    with whether the configuration alone lets one expect that. start: the token before every answer, where a decoder
    says it of what an encoder has read; None where one model reads both.
    """

    name: str
    stages: tuple[Stage, ...]
    kept: dict[str, str]  # module name -> reason
    question: str  # prompt for a question
    caption: str  # prompt for a caption
    loose_head: tuple[str, bool] | None = None
    start: int | None = None


def attention(linears: str, after: str | None = None, part: str | None = None) -> Reads:
    return Reads(_expand(linears), "attention", after, part)


def feedforward(linears: str, after: str | None = None) -> Reads:
    return Reads(_expand(linears), "feedforward", after)


def projection(linears: str) -> Reads:
    return Reads(_expand(linears), "projection")


def _expand(pattern: str) -> tuple[str, ...]:
    """`mlp.{gate,up}_proj` -> `mlp.gate_proj`, `mlp.up_proj`."""
    braces = re.search(r"\{(.*?)\}", pattern)
    if not braces:
        return (pattern,)
    return tuple(pattern.replace(braces[0], name) for name in braces[1].split(","))


# BLIP-2's ViT stacks q, k and v as [3, heads, d]: rows 2C:3C are v. GELU does not commute with a scale, so nothing
# can be folded into fc1.
VIT = (
    attention("self_attn.qkv", after="layer_norm1"),
    attention("self_attn.projection", after="self_attn.qkv", part="v"),
    feedforward("mlp.fc1", after="layer_norm2"),
    feedforward("mlp.fc2"),
)

# Post-norm: each norm's output is also the residual, so nothing can absorb a scale but v before the output.
# Keys and values of the cross-attention read the vision tower, not the queries.
QFORMER = (
    attention("attention.attention.{query,key,value}"),
    attention("attention.output.dense", after="attention.attention.value"),
    attention("crossattention.attention.query"),
    attention("crossattention.attention.{key,value}"),
    attention("crossattention.output.dense", after="crossattention.attention.value"),
    feedforward("intermediate_query.dense"),
    feedforward("output_query.dense"),
)

OPT = (
    attention("self_attn.{q,k,v}_proj", after="self_attn_layer_norm"),
    attention("self_attn.out_proj", after="self_attn.v_proj"),
    feedforward("fc1", after="final_layer_norm"),
    feedforward("fc2", after="fc1"),  # ReLU commutes with a positive scale
)

CLIP = (
    attention("self_attn.{q,k,v}_proj", after="layer_norm1"),
    attention("self_attn.out_proj", after="self_attn.v_proj"),
    feedforward("mlp.fc1", after="layer_norm2"),
    feedforward("mlp.fc2"),
)

PROJECTOR = (projection("linear_1"), projection("linear_2"))

# Llama, Mistral and Qwen2 (which adds biases to q, k and v).
LLAMA = (
    attention("self_attn.{q,k,v}_proj", after="input_layernorm"),
    attention("self_attn.o_proj", after="self_attn.v_proj"),
    feedforward("mlp.{gate,up}_proj", after="post_attention_layernorm"),
    feedforward("mlp.down_proj", after="mlp.up_proj"),  # gate(x) * up(x): linear in up
)


# Flan-T5. The keys and values of the cross-attention of all blocks read what the encoder put out, through its last
# norm: that could absorb one scale for all of them, but one block is in memory at a time.
T5_SELF = (
    attention("layer.0.SelfAttention.{q,k,v}", after="layer.0.layer_norm"),
    attention("layer.0.SelfAttention.o", after="layer.0.SelfAttention.v"),
)
T5_CROSS = (
    attention("layer.1.EncDecAttention.q", after="layer.1.layer_norm"),
    attention("layer.1.EncDecAttention.{k,v}"),
    attention("layer.1.EncDecAttention.o", after="layer.1.EncDecAttention.v"),
)
T5_HANDS_ON = ("position_bias", "encoder_decoder_position_bias")  # the first block computes them for all


def _t5_feedforward(layer: str) -> tuple[Reads, ...]:
    return (
        feedforward(f"{layer}.DenseReluDense.{{wi_0,wi_1}}", after=f"{layer}.layer_norm"),
        feedforward(f"{layer}.DenseReluDense.wo", after=f"{layer}.DenseReluDense.wi_1"),  # gelu(wi_0 x) * wi_1 x
    )


def loose(reads: tuple[Reads, ...], *linears: str) -> tuple[Reads, ...]:
    """The same table with nothing to fold into before `linears`."""
    return tuple(replace(entry, after=None) if set(entry.linears) & set(linears) else entry for entry in reads)


def _head(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _blip2(config: PretrainedConfig) -> Family:
    text, vision = config.text_config, config.vision_config
    if text.model_type not in ("opt", "t5"):
        raise VlmqError(f"language_model: BLIP-2 with {text.model_type} is not supported; use opt or t5")
    seen = Stream(
        norm="layer",
        width=vision.hidden_size,
        head=_head(vision),
        values=("self_attn.qkv", "self_attn.projection"),
        writers=("self_attn.projection", "mlp.fc2"),
        sources=("vision_model.embeddings.patch_embedding",),
        embeddings=("vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding"),
        last=Reads(
            _expand("qformer.encoder.layer.*.crossattention.attention.{key,value}"),
            "attention",
            after="vision_model.post_layernorm",
        ),
    )
    looking = (
        Stage("vision", "vision_model.encoder.layers", VIT, fused={"self_attn.qkv": ("q", "k", "v")}, stream=seen),
        Stage("connector", "qformer.encoder.layer", QFORMER),
        Stage("connector", "language_projection", (projection(""),), single=True),
    )
    return (_blip2_t5 if text.model_type == "t5" else _blip2_opt)(text, looking)


def _blip2_t5(text: PretrainedConfig, looking: tuple[Stage, ...]) -> Family:
    if not text.is_gated_act:
        raise VlmqError("language_model: BLIP-2 with a T5 whose feed-forward has no gate is not supported; use Flan-T5")
    untied = not text.scale_decoder_outputs  # of T5, transformers keeps no other trace of what config.json says
    encoder, decoder = "language_model.encoder.block", "language_model.decoder.block"
    asking, answering = (*T5_SELF, *_t5_feedforward("layer.1")), (*T5_SELF, *T5_CROSS, *_t5_feedforward("layer.2"))
    return Family(
        name="blip-2",
        stages=(
            *looking,
            Stage("language", encoder, asking, hands_on=T5_HANDS_ON),
            Stage("language", decoder, answering, hands_on=T5_HANDS_ON, answers=True),
        ),
        kept={"language_model.lm_head": "output head" if untied else "output head, tied to the token embedding"},
        question="Question: {} Short answer:",  # of BLIP-2's authors, where the language model is Flan-T5
        caption="a photo of",
        loose_head=("language_model.lm_head", untied),
        start=start_token(text),
    )


def start_token(text: PretrainedConfig) -> int:
    """The token that an encoder-decoder's answers begin with; of a T5 that names none, the one that pads."""
    named = getattr(text, "decoder_start_token_id", None)
    return text.pad_token_id if named is None else named


def _blip2_opt(text: PretrainedConfig, looking: tuple[Stage, ...]) -> Family:
    opt: tuple[Reads, ...] = OPT
    if not text.do_layer_norm_before or not text.layer_norm_elementwise_affine:  # post-norm (opt-350m), or bare norms
        opt = loose(opt, "self_attn.q_proj", "fc1")
    if text.activation_function != "relu":
        opt = loose(opt, "fc2")
    decoder = "language_model.model.decoder"
    spoken = Stream(
        norm="layer",
        width=text.hidden_size,
        head=_head(text),
        values=("self_attn.v_proj", "self_attn.out_proj"),
        writers=("self_attn.out_proj", "fc2"),
        sources=("language_projection",),
        embeddings=(f"{decoder}.embed_tokens.weight", f"{decoder}.embed_positions.weight"),
        last=Reads(("language_model.lm_head",), "projection", after=f"{decoder}.final_layer_norm"),
        tied=f"{decoder}.embed_tokens.weight",
    )
    plain = opt[0].after and text.word_embed_proj_dim == text.hidden_size and not text._remove_final_layer_norm
    return Family(
        name="blip-2",
        stages=(
            *looking,
            Stage("language", f"{decoder}.layers", opt, stream=spoken if plain else None),
        ),
        kept={
            "language_model.lm_head": "output head, tied to the token embedding"
            if text.tie_word_embeddings
            else "output head",
            f"{decoder}.project_in": "width change of the token embedding",
            f"{decoder}.project_out": "width change before the output head",
        },
        question="Question: {} Answer:",
        caption="a photo of",
    )


def _read_vision_layers(config: PretrainedConfig) -> int:
    """How many CLIP layers run before the last hidden state LLaVA reads: with -2, all but one."""
    layer = config.vision_feature_layer
    return layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer


def _llava(config: PretrainedConfig) -> Family:
    text, vision = config.text_config, config.vision_config
    if text.model_type not in ("llama", "mistral", "qwen2"):
        raise VlmqError(f"language_model: LLaVA with {text.model_type} is not supported; use llama, mistral or qwen2")
    if vision.model_type != "clip_vision_model":
        raise VlmqError(
            f"vision_tower: LLaVA with {vision.model_type} is not supported; the supported tower is clip_vision_model"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise VlmqError(
            f"config.json: vision_feature_layer {config.vision_feature_layer} reads several layers; one is supported"
        )
    llama: tuple[Reads, ...] = LLAMA
    if text.num_key_value_heads != text.num_attention_heads:  # grouped queries: several rows of o read one row of v
        llama = loose(llama, "self_attn.o_proj")
    seen = Stream("layer", vision.hidden_size, _head(vision), ("self_attn.v_proj", "self_attn.out_proj"))
    spoken = Stream(
        norm="rms",
        width=text.hidden_size,
        head=_head(text),
        values=("self_attn.v_proj", "self_attn.o_proj"),
        writers=("self_attn.o_proj", "mlp.down_proj"),
        sources=("model.multi_modal_projector.linear_2",),
        embeddings=("model.language_model.embed_tokens.weight",),
        last=Reads(("lm_head",), "projection", after="model.language_model.norm"),
        tied="model.language_model.embed_tokens.weight",
    )
    return Family(
        name="llava",
        stages=(
            Stage("vision", "model.vision_tower.encoder.layers", CLIP, live=_read_vision_layers, stream=seen),
            Stage("connector", "model.multi_modal_projector", PROJECTOR, single=True),
            Stage("language", "model.language_model.layers", llama, stream=spoken),
        ),
        kept={"lm_head": "output head"},
        question="USER: <image>\n{} ASSISTANT:",
        caption="USER: <image>\nDescribe the image. ASSISTANT:",
    )


TOWERS = {"blip-2": "vision_model", "llava": "model.vision_tower"}  # the module that sees pixels
FAMILIES: dict[str, Callable[[PretrainedConfig], Family]] = {"blip-2": _blip2, "llava": _llava}


def family_of(config: PretrainedConfig) -> Family:
    """The table for a configuration; VlmqError where there is none."""
    make = FAMILIES.get(config.model_type)
    if make is None:
        raise VlmqError(
            f"config.json: model type {config.model_type!r} is not a vision-language model vlmq knows; "
            f"it exports {', '.join(FAMILIES)}"
        )
    return make(config)
