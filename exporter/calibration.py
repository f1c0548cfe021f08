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
from transformers import ProcessorMixin

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import Family
from vlmq.exporter.images import open_image
from vlmq.exporter.runtime import check_image_tokens
from vlmq.exporter.samples import IMAGE_MARK, Sample, prompt_of
from vlmq.exporter.statistics import Statistics
from vlmq.exporter.walk import Block

BATCH = 16  # samples of equal length that run together

Inputs = dict[str, Tensor]


@dataclass
class Call:
    """The arguments of one block for one batch; `hidden` is replaced as the blocks go by."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Tensor:
        if "hidden_states" in self.kwargs:
            return _tensor(block(*self.args, **{**self.kwargs, "hidden_states": self.hidden}))
        return _tensor(block(self.hidden, *self.args, **self.kwargs))


@dataclass
class Calibration:
    """Batches of prepared samples, and the outputs of the stages that have run: what later stages are played."""

    model: nn.Module
    batches: list[Inputs]
    played: list[tuple[tuple[Block, ...], dict[int, Tensor]]] = field(default_factory=list)

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
        return {index: self._catch(first, index) for index in reaching}

    def finish(self, stage: tuple[Block, ...], calls: dict[int, Call]) -> None:
        """Remember what a stage put out."""
        self.played.append((stage, {index: call.hidden for index, call in calls.items()}))

    def _catch(self, block: nn.Module, index: int) -> Call:
        caught: list[Call] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(Call(args[0], args[1:], kwargs) if args else Call(kwargs["hidden_states"], (), kwargs))
            raise _Reached

        hook = block.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with ExitStack() as stubs:
                for stage, outputs in self.played:
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


@torch.no_grad()
def gather(block: Block, model: nn.Module, calls: Collection[Call]) -> tuple[list[Statistics], Tensor]:
    """Run a block on every batch: the statistics of each of its distinct inputs, and the first batch's output."""
    statistics = [Statistics.empty(entry.sites[0].columns) for entry in block.inputs]
    hooks = [
        model.get_submodule(entry.sites[0].name).register_forward_pre_hook(
            lambda module, args, kept=kept: kept.add(args[0])
        )
        for entry, kept in zip(block.inputs, statistics, strict=True)
    ]
    module = model.get_submodule(block.name)
    try:
        outputs = [call.run(module) for call in calls]
    finally:
        for hook in hooks:
            hook.remove()
    return statistics, outputs[0]


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
