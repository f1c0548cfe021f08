"""Calibration: the inputs that image-text samples give each block, caught by running the model's own forward.

A stage's first inputs are caught by running the model until its first block; the stages before it are not run again
but played back from what their (quantized) blocks put out. So masks, positions and the merging of image features into
the text are the model's own code, and only one block's weights are in memory.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import Family
from vlmq.exporter.images import open_image
from vlmq.exporter.runtime import check_image_tokens
from vlmq.exporter.samples import IMAGE_MARK, Sample, prompt_of
from vlmq.exporter.statistics import Statistics
from vlmq.exporter.walk import Block

BATCH = 16  # samples of equal length that run together
ROWS = 1024  # of an input are kept as they are, for methods that round them

Inputs = dict[str, Tensor]


@dataclass
class Call:
    """The arguments of one block for one batch; `hidden` is replaced as the blocks go by.

    reference: the same call among full-precision blocks, where they run alongside (on the embedding as it will be).
    vision: which tokens (batch, sequence) are of the image; None where all are, or nobody asks.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reference: "Call | None" = None
    vision: Tensor | None = None

    def run(self, block: nn.Module) -> Tensor:
        if "hidden_states" in self.kwargs:
            return _tensor(block(*self.args, **{**self.kwargs, "hidden_states": self.hidden}))
        return _tensor(block(self.hidden, *self.args, **self.kwargs))


Played = list[tuple[tuple[Block, ...], dict[int, Tensor]]]


@dataclass
class Calibration:
    """Batches of prepared samples, and the outputs of the stages that have run: what later stages are played.

    alongside: whether the full-precision model runs alongside the quantized one.
    """

    model: PreTrainedModel
    batches: list[Inputs]
    alongside: bool = False
    played: Played = field(default_factory=list)
    reference_played: Played = field(default_factory=list)

    @torch.no_grad()
    def calls(self, stage: tuple[Block, ...]) -> dict[int, Call]:
        """The arguments with which the model calls the first block of a stage, by batch.

        Batches of text alone reach the language model and nothing before it.
        """
        first = self.model.get_submodule(stage[0].name)
        reaching = [
            index
            for index, batch in enumerate(self.batches)
            if "pixel_values" in batch or stage[0].component == "language"
        ]
        calls = {index: self._catch(first, index, self.played) for index in reaching}
        for index, call in calls.items():
            if self.alongside:
                call.reference = self._catch(first, index, self.reference_played)
            if stage[0].component == "language":
                call.vision = vision_tokens(self.batches[index], self.model.config)
        return calls

    def finish(self, stage: tuple[Block, ...], calls: dict[int, Call]) -> None:
        """Remember what a stage put out."""
        self.played.append((stage, {index: call.hidden for index, call in calls.items()}))
        references = {index: call.reference.hidden for index, call in calls.items() if call.reference}
        self.reference_played.append((stage, references))

    def _catch(self, block: nn.Module, index: int, played: Played) -> Call:
        caught: list[Call] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(Call(args[0], args[1:], kwargs) if args else Call(kwargs["hidden_states"], (), kwargs))
            raise _Reached

        hook = block.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with ExitStack() as stubs:
                for stage, outputs in played:
                    if index in outputs:
                        stubs.enter_context(_playing(self.model, stage, outputs[index]))
                self.model(**self.batches[index], use_cache=False)
        except _Reached:
            return caught[0]
        finally:
            hook.remove()
        raise RuntimeError("the model's forward never reached the block; its architecture table is wrong")


class _Reached(Exception):  # noqa: N818 - not a fault: it ends a forward that has done its work
    """The forward has come to the block whose inputs are wanted."""


@contextmanager
def _playing(model: nn.Module, stage: tuple[Block, ...], output: Tensor) -> Iterator[None]:
    """The stage's last live block gives `output`; all others hand on what they get."""
    last = model.get_submodule(stage[-1].name)
    path = stage[-1].name.rpartition(".")[0]
    parent = model.get_submodule(path)
    blocks = list(parent) if isinstance(parent, nn.ModuleList) else [last]
    for block in blocks:
        block.forward = (lambda *args, **kwargs: output) if block is last else _hand_on  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def prepare(samples: Sequence[Sample], processor: ProcessorMixin, family: Family) -> list[Inputs]:
    """The model's inputs for samples (prompt and first answer), in batches of equal length, so that none is padded."""
    prepared: dict[tuple[int, bool], list[Inputs]] = {}
    for sample in samples:
        if sample.image is None and IMAGE_MARK not in family.question:
            raise VlmqError(f"{sample.id}: {family.name} reads no prompt without an image; leave text alone out")
        text = " ".join([prompt_of(sample, family), *sample.answers[:1]])
        image = None if sample.image is None else open_image(sample.image)
        inputs = dict(processor(images=image, text=text, return_tensors="pt"))
        if image is not None:
            check_image_tokens(processor, text, inputs["input_ids"][0].numpy())
        prepared.setdefault((inputs["input_ids"].shape[1], image is None), []).append(inputs)
    return [
        {key: torch.cat([inputs[key] for inputs in same[start : start + BATCH]]) for key in same[0]}
        for _, same in sorted(prepared.items())
        for start in range(0, len(same), BATCH)
    ]


def vision_tokens(batch: Inputs, config: PretrainedConfig) -> Tensor:
    """Which positions of a batch hold an image token: bool (batch, sequence)."""
    token = getattr(config, "image_token_id", None)
    return batch["input_ids"] == (config.image_token_index if token is None else token)


@dataclass(frozen=True)
class Wanted:
    """What is kept of one input besides its sums: whether its rows, what the reference reads, and how much the
    tokens of the image count (text counts 1)."""

    rows: bool = False
    cross: bool = False
    vision_weight: float = 1.0


@torch.no_grad()
def gather(
    block: Block,
    model: nn.Module,
    calls: Collection[Call],
    wanted: Sequence[Wanted] | None = None,
    all_outputs: bool = False,
) -> tuple[list[Statistics], list[Tensor]]:
    """Run a full-precision block on every batch: the statistics of each of its distinct inputs, and its outputs.

    Outputs are those of the first batch, or of all.
    Where the full-precision model runs alongside, its calls move on to the next block.
    """
    wanted = wanted or [Wanted()] * len(block.inputs)
    statistics = [
        Statistics.empty(entry.sites[0].columns, cross=want.cross)
        for entry, want in zip(block.inputs, wanted, strict=True)
    ]
    module = model.get_submodule(block.name)
    read: dict[int, Tensor] = {}
    hooks = [
        model.get_submodule(entry.sites[0].name).register_forward_pre_hook(
            lambda module, args, index=index: read.__setitem__(index, args[0])
        )
        for index, entry in enumerate(block.inputs)
    ]
    outputs: list[Tensor] = []
    try:
        for call in calls:
            output = call.run(module)
            if all_outputs or not outputs:
                outputs.append(output)
            inputs = dict(read)
            references: dict[int, Tensor] = {}
            if call.reference:
                call.reference.hidden = call.reference.run(module)
                references = dict(read)
            for index, want in enumerate(wanted):
                weights = None
                if want.vision_weight != 1 and call.vision is not None:
                    weights = torch.where(call.vision, want.vision_weight, 1.0)
                keep = -(-ROWS // len(calls)) if want.rows else 0
                statistics[index].add(inputs[index], weights, references.get(index), keep)
    finally:
        for hook in hooks:
            hook.remove()
    return statistics, outputs


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
