"""An export on paper: what it reads, what becomes of every linear, and how much there is of each.

A configuration is enough: what is not known before the samples are read, the length of their texts, is assumed.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import nn

from vlmq.exporter.activations import MEMORY
from vlmq.exporter.calibration import together
from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.inspection import stored_dtype
from vlmq.exporter.quantize import needs_reference
from vlmq.exporter.recipe import Assignment
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.walk import Block, Input, Site, Walk

FLOAT = 4  # bytes of a float32
CHANNELS = 3  # of a picture: red, green, blue
TEXT = 32  # tokens of a prompt and its answer: captions and VQAv2's questions have fewer


@dataclass(frozen=True)
class Part:
    """Bytes that one thing takes, and why it has to."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Need:
    """All that a step of an export holds at once, in memory or on disk; `remedy` is for who has less than that."""

    step: str
    parts: tuple[Part, ...]
    remedy: str

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Workload:
    """The walk of a checkpoint's skeleton, what a recipe assigns to it, and how it is to be exported.

    samples: calibrated on; 0 where no method looks at any.
    """

    checkpoint: Checkpoint
    skeleton: nn.Module
    walk: Walk
    assignment: Assignment
    samples: int
    formats: Literal["safetensors", "onnx", "both"]
    verify: bool
    activation_memory: int = MEMORY
    gate: bool = False
    accuracy_level: int = 0

    @property
    def batch(self) -> int:
        """Samples that run together."""
        speaking = next(block for block in reversed(self.walk.blocks) if block.component == "language")
        return min(self.samples, together(self.tokens(speaking)))

    @property
    def stored(self) -> int:
        """Bytes of a weight in the checkpoint."""
        return stored_dtype(self.checkpoint).itemsize

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Elements of every parameter, one that is tied under each of its names."""
        return {name: value.numel() for name, value in self.skeleton.named_parameters(remove_duplicate=False)}

    @cached_property
    def parameters(self) -> int:
        """Elements of all parameters, each once."""
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    def elements(self, block: Block) -> int:
        """Elements of a block's parameters."""
        return sum(count for name, count in self.sizes.items() if name.startswith(f"{block.name}."))

    def largest(self, block: Block) -> int:
        """Elements of the largest of a block's parameters."""
        return max(count for name, count in self.sizes.items() if name.startswith(f"{block.name}."))

    def quantized(self, entry: Input) -> list[tuple[Site, Scheme]]:
        """The linears that read an input and are quantized."""
        schemes = self.assignment.schemes
        return [(site, schemes[site.name]) for site in entry.sites if site.name in schemes]

    @cached_property
    def schemes(self) -> list[Scheme]:
        return list(self.assignment.schemes.values())

    def tokens(self, block: Block) -> int:
        """Tokens of one sample in a block: patches and the class token, queries, or what of them reaches the text."""
        vision = self.checkpoint.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        if block.component == "vision":
            return patches
        image = getattr(self.checkpoint.config, "num_query_tokens", None) or patches
        return image + TEXT if block.component == "language" else image

    def hidden(self, stage: tuple[Block, ...]) -> int:
        """Bytes of what one sample has between the blocks of a stage, or of what it leaves behind."""
        first, last = stage[0].sites[0], stage[-1].sites[-1]
        width = {"embedding": 0, "head": first.columns}.get(last.kind, max(first.columns, last.rows))
        return self.tokens(stage[0]) * width * FLOAT

    @cached_property
    def activations(self) -> int:
        """Bytes of all that waits between blocks when the last stage runs: pixels, and what every stage left behind (a
        decoder reads what its encoder did in every block), twice where the full-precision model runs alongside."""
        vision = self.checkpoint.config.vision_config
        pixels = CHANNELS * vision.image_size**2 * FLOAT
        streams = 2 if needs_reference(self.assignment) else 1
        behind = sum((1 + stage[0].answers) * self.hidden(stage) for stage in self.walk.stages)
        return self.samples * (pixels + streams * behind)

    @property
    def activations_on_disk(self) -> int:
        """Bytes of them in files: all, for a stopped run to go on from, and the widest stage's twice, for a block's
        inputs stay until all of its outputs are there."""
        return self.activations + self.samples * max(self.hidden(stage) for stage in self.walk.stages)

    @property
    def codes(self) -> int:
        """Bytes of the codes of all quantized linears, before they are packed."""
        linears = (site for site in self.walk.sites if site.name in self.assignment.schemes)
        return sum(site.rows * site.columns for site in linears)
