"""What each consumer takes quantized: `consumer` in a recipe leaves the rest alone, and refuses what it cannot read.

transformers   compressed-tensors: several grids only where all are symmetric, rounded inputs only beside such weights
vllm           the linears of the language model's blocks; 2, 4 or 8 bits. Read in vLLM's source: BLIP-2's Q-Former and
               projection have no quantized form there, its vision tower is built without a name that a target could
               match, and LLaVA's tower has other names than its files. 3, 5 and 6 bits are packed in another way by the
               release of compressed-tensors that vLLM uses, and inputs are rounded for `int-quantized` files alone.
onnxruntime    whatever a recipe says: where it has no product for two grids, inputs are rounded beforehand
any            nobody in particular: nothing is left alone
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.walk import Input, Site, Walk
from vlmq.formats import compressed_tensors
from vlmq.formats.compressed_tensors import Grids
from vlmq.kernels.grid import ROW, TENSOR

Name = Literal["any", "transformers", "vllm", "onnxruntime"]
Formats = Literal["safetensors", "onnx", "both"]


@dataclass(frozen=True)
class Consumer:
    """A program that loads exports. `leaves`: by family, beginnings of names and why it takes none of these quantized.

    bits, groups: what its kernels take; none: anything. renames: beginnings of its own names for modules, by ours.
    """

    format: Literal["safetensors", "onnx"] | None = None  # what it reads; None: either
    leaves: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    bits: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # its linears that stack several of ours
    renames: tuple[tuple[str, tuple[str, ...]], ...] = ()


CONSUMERS: dict[Name, Consumer] = {
    "any": Consumer(),
    "transformers": Consumer(format="safetensors"),
    "vllm": Consumer(
        format="safetensors",
        leaves={
            "blip-2": (
                ("qformer.", "vLLM has no quantized Q-Former"),
                ("language_projection", "vLLM has no quantized projection"),
                ("vision_model.", "vLLM builds this vision tower without a name that a target could match"),
            ),
            "llava": (
                ("model.vision_tower.", "vLLM has other names for this vision tower than its files"),
                ("model.multi_modal_projector.", "vLLM has another name for this projector than its files"),
            ),
        },
        bits=(2, 4, 8),
        groups=(ROW, TENSOR, 32, 64, 128),
        fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
        renames=(
            ("model.language_model.", ("language_model.model.",)),
            ("model.vision_tower.", ("vision_tower.", "vision_tower.vision_model.")),
            ("model.multi_modal_projector.", ("multi_modal_projector.",)),
            ("lm_head", ("language_model.lm_head",)),
            ("vision_model.", ("", ".")),
        ),
    ),
    "onnxruntime": Consumer(format="onnx"),
}


def left_alone(name: Name, walk: Walk) -> dict[str, str]:
    """The sites of a model that the consumer takes in full precision alone, and why.

    VlmqError for a model that it does not run, and for the output head and the token embedding, which are sites only
    where somebody asked for them.
    """
    consumer = CONSUMERS[name]
    if name == "vllm" and any(block.answers for block in walk.blocks):
        first = next(block for block in walk.blocks if block.component == "language")
        raise VlmqError(f"{first.name}: vLLM runs no encoder-decoder; choose another --consumer")
    left = {}
    for site in walk.sites:
        why = next((why for start, why in consumer.leaves.get(walk.family, ()) if site.name.startswith(start)), None)
        if name == "vllm" and site.kind in ("head", "embedding"):
            raise VlmqError(f"{site.name}: vLLM takes it in half precision alone; leave {site.kind} out of the recipe")
        if why:
            left[site.name] = why
    return left


def refuse(name: Name, walk: Walk, schemes: Mapping[str, Scheme]) -> None:
    """VlmqError for the first scheme that the consumer cannot read."""
    consumer = CONSUMERS[name]
    for site, scheme in schemes.items():
        if scheme.inputs and name == "vllm":
            raise VlmqError(
                f"{site}: vllm rounds inputs for int-quantized files, which vlmq does not write; leave out "
                "--activation-bits, or choose --consumer transformers"
            )
        if consumer.bits and scheme.grid.bits not in consumer.bits:
            raise VlmqError(
                f"{site}: {scheme.grid.bits} bits, which {name} reads in another layout or not at all; choose "
                f"{_either(consumer.bits)} bits, or another --consumer"
            )
        if consumer.groups and scheme.grid.group not in consumer.groups:
            raise VlmqError(
                f"{site}: groups of {scheme.grid.group}, for which {name} has no kernel; choose --group-size "
                f"{_either([group for group in consumer.groups if group > 0])} or row"
            )
    for entry in (entry for block in walk.blocks for entry in block.inputs):
        _refuse_unlike_shards(name, entry, schemes)
    if name == "transformers":
        grids = {site: Grids(scheme.grid.stored, scheme.inputs) for site, scheme in schemes.items()}
        ends = [site.name for site in walk.sites if site.kind == "embedding"]
        why = compressed_tensors.unloadable(grids, ends[0] if ends else None)
        if why:
            raise VlmqError(f"recipe: {why}; give all linears one grid, or --symmetric, or choose another --consumer")


def _refuse_unlike_shards(name: Name, entry: Input, schemes: Mapping[str, Scheme]) -> None:
    """Linears that the consumer stacks into one have one grid or none."""
    by_shard = {site.name.rpartition(".")[2]: site for site in entry.sites}
    for fused, shards in CONSUMERS[name].fused.items():
        stacked = [by_shard[shard].name for shard in shards if shard in by_shard]
        found = [site in schemes and schemes[site].grid for site in stacked]
        if any(grid != found[0] for grid in found):
            other = next(site for site, grid in zip(stacked, found, strict=True) if grid != found[0])
            raise VlmqError(
                f"{other}: another grid than {stacked[0]}, with which {name} stacks it into one {fused}; give both one"
            )


def _either(numbers: Iterable[int]) -> str:
    first = [str(number) for number in numbers]
    return f"{', '.join(first[:-1])} or {first[-1]}"


def refuse_format(name: Name, formats: Formats) -> None:
    """VlmqError where nothing that the consumer reads would be written."""
    reads = CONSUMERS[name].format
    if reads and formats not in (reads, "both"):
        raise VlmqError(f"--format {formats}: {name} reads {reads}; choose --format {reads}, or another --consumer")


def formats(name: Name) -> Formats:
    """What is written where nobody says: what the consumer reads, both for nobody in particular."""
    return CONSUMERS[name].format or "both"


def aliases(name: Name, modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The names that the consumer has for modules, beside theirs in transformers' memory."""
    consumer = CONSUMERS[name]
    shards = {shard: fused for fused, stacked in consumer.fused.items() for shard in stacked}
    found = {}
    for module in modules:
        named = [module, *_renamed(module, consumer)]
        stacked = [re.sub(r"[^.]+$", lambda leaf: shards.get(leaf[0], leaf[0]), other) for other in named]
        found[module] = tuple(dict.fromkeys(other for other in (*named, *stacked) if other != module))
    return found


def _renamed(module: str, consumer: Consumer) -> list[str]:
    for start, others in consumer.renames:
        if module.startswith(start):
            return [other + module.removeprefix(start) for other in others]
    return []


def told(left: Mapping[str, str], sites: Iterable[Site]) -> list[str]:
    """A line for each thing that is left alone: what, how many linears of it, why."""
    counts: dict[tuple[str, str], int] = {}
    for site in sites:
        if site.name in left:
            what = re.split(r"\.\d+\.", site.name)[0]
            counts[what, left[site.name]] = counts.get((what, left[site.name]), 0) + 1
    return [
        f"{what}: {count} linear{'s' if count > 1 else ''} left in full precision: {why}"
        for (what, why), count in counts.items()
    ]
