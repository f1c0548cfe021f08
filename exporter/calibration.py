"""Calibration: the inputs that image-text samples give each block, caught by running the model's own forward.

A stage's first inputs are caught by running the model until its first block; the stages before it are not run again
but played back from what their (quantized) blocks put out. So masks, positions and the merging of image features into
the text are the model's own code, and only one block's weights are in memory.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from vlmq.exporter import workers
from vlmq.exporter.activations import Activations, Kept
from vlmq.exporter.devices import CPU
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import Family
from vlmq.exporter.images import open_image
from vlmq.exporter.inference.once import instead
from vlmq.exporter.runtime import check_image_tokens
from vlmq.exporter.samples import IMAGE_MARK, Sample, prompt_of
from vlmq.exporter.statistics import Statistics
from vlmq.exporter.sums import Sums
from vlmq.exporter.walk import Block

BATCH, TOKENS = 16, 4096  # samples of equal length, and tokens of theirs, that run together at most
ROWS = 1024  # of an input are kept as they are, for methods that round them

Inputs = dict[str, Tensor]


class Call:
    """The arguments of one block for one batch; `hidden` is replaced as the blocks go by.

    Its tensors wait in `activations`. reference: the same call among full-precision blocks, where they run alongside
    (on the embedding as it will be). vision: which tokens (batch, sequence) are of the image; None where all are, or
    nobody asks. hands_on: the arguments that blocks return for the next, by name. They depend on the shape of the
    hidden states alone: what the first block that ran returned is `handed` to all. dtype: in which linears multiply.
    """

    def __init__(
        self,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reference: "Call | None" = None,
        vision: Tensor | None = None,
        activations: Activations | None = None,
        hands_on: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.activations, self.dtype = activations or Activations(), dtype
        self.hands_on, self.handed = hands_on, dict[str, Kept]()
        self.place = self.activations.keep(hidden.cpu())
        self.by_name = "hidden_states" in kwargs
        self._args = _kept(args, self.activations)
        self._kwargs = _kept(
            {name: value for name, value in kwargs.items() if name != "hidden_states"}, self.activations
        )
        self.reference, self.vision = reference, vision

    @property
    def hidden(self) -> Tensor:
        return self.place.read()

    @hidden.setter
    def hidden(self, value: Tensor) -> None:
        self.place = self.activations.keep(value.cpu())

    def run(self, block: nn.Module, hidden: Tensor | None = None, exact: bool = False) -> Tensor:
        """What the block makes of `hidden`, or of others; computed where its weights are. exact: in float32."""
        device = _device(block)
        hidden = (self.hidden if hidden is None else hidden).to(device)
        args, kwargs = _read(self._args, device), _read({**self._kwargs, **self.handed}, device)
        with nullcontext() if exact or self.dtype == torch.float32 else _multiplying_in(self.dtype, block):
            output = block(*args, hidden_states=hidden, **kwargs) if self.by_name else block(hidden, *args, **kwargs)
        if self.hands_on and not self.handed:
            said = zip(self.hands_on, output[1:], strict=False)
            self.handed = {name: self.activations.keep(value.cpu()) for name, value in said if value is not None}
        return _tensor(output)


@contextmanager
def _multiplying_in(dtype: torch.dtype, block: nn.Module) -> Iterator[None]:
    """Meanwhile the linears of a block multiply in another dtype; what they read and put out stays as it was."""

    def forward(linear: nn.Linear, x: Tensor) -> Tensor:
        product = torch.nn.functional.linear(x.to(dtype), linear.weight.to(dtype)).to(x.dtype)
        return product if linear.bias is None else product.add_(linear.bias)

    with ExitStack() as stack:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                stack.enter_context(instead(module, partial(forward, module)))
        yield


def _kept(value: Any, activations: Activations) -> Any:
    """Arguments of a module with every tensor put away."""
    match value:
        case Tensor():
            return activations.keep(value.cpu())
        case tuple() | list():
            return tuple(_kept(each, activations) for each in value)
        case dict():
            return {name: _kept(each, activations) for name, each in value.items()}
    return value


def _read(value: Any, device: torch.device = CPU) -> Any:
    """Arguments that were put away."""
    match value:
        case Kept():
            return value.read().to(device)
        case tuple():
            return tuple(_read(each, device) for each in value)
        case dict():
            return {name: _read(each, device) for name, each in value.items()}
    return value


Played = list[tuple[tuple[Block, ...], dict[int, Kept]]]


class Calibration:
    """Batches of prepared samples, and the outputs of the stages that have run: what later stages are played.

    alongside: whether the full-precision model runs alongside the quantized one. dtype: in which linears of blocks
    multiply on the way: float32, or bfloat16, which many processors do several times as fast. device: where the parts
    of the model are that are no blocks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Inputs],
        alongside: bool = False,
        activations: Activations | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        self.model, self.alongside, self.dtype, self.device = model, alongside, dtype, device
        self.activations = activations or Activations()
        self.played: Played = []
        self.reference_played: Played = []
        self._batches = [_kept(batch, self.activations) for batch in batches]

    @property
    def batches(self) -> list[Inputs]:
        """All of them, in memory."""
        return [_read(batch) for batch in self._batches]

    @torch.no_grad()
    def calls(self, stage: tuple[Block, ...]) -> dict[int, Call]:
        """The arguments with which the model calls the first block of a stage, by batch; only of this worker's."""
        first = self.model.get_submodule(stage[0].name)
        mine = [index for index in self.reaching(stage) if workers.is_mine(index)]
        calls = {index: self._catch(first, index, self.played, stage[0].hands_on) for index in mine}
        for index, call in calls.items():
            if self.alongside:
                call.reference = self._catch(first, index, self.reference_played, stage[0].hands_on)
            if stage[0].component == "language" and not stage[0].answers:
                call.vision = vision_tokens({"input_ids": _read(self._batches[index]["input_ids"])}, self.model.config)
        return calls

    def reaching(self, stage: tuple[Block, ...]) -> list[int]:
        """The batches, of all workers, that a stage sees: those of text alone see the language model only."""
        return [
            index
            for index, batch in enumerate(self._batches)
            if "pixel_values" in batch or stage[0].component == "language"
        ]

    def finish(self, stage: tuple[Block, ...], calls: dict[int, Call]) -> None:
        """Remember what a stage put out."""
        self.played.append((stage, {index: call.place for index, call in calls.items()}))
        references = {index: call.reference.place for index, call in calls.items() if call.reference}
        self.reference_played.append((stage, references))

    def state(self, calls: Mapping[int, Call]) -> dict[str, Any]:
        """What lies behind the blocks that have run, made durable: the names of files, by batch, of all workers.

        calls: of the running stage.
        """

        def saved(places: Mapping[Any, Kept]) -> dict[str, str]:
            return workers.united(dict(zip(map(str, places), self.activations.save(places.values()), strict=True)))

        return {
            "hidden": saved({index: call.place for index, call in calls.items()}),
            "reference": saved({index: call.reference.place for index, call in calls.items() if call.reference}),
            "handed": saved({f"{name} {at}": kept for at, call in calls.items() for name, kept in call.handed.items()}),
            "played": [saved(outputs) for _, outputs in self.played],
            "reference_played": [saved(outputs) for _, outputs in self.reference_played],
        }

    def restore(self, state: Mapping[str, Any], stages: Sequence[tuple[Block, ...]]) -> None:
        """Go on behind the stages that an earlier run finished."""
        for key, played in (("played", self.played), ("reference_played", self.reference_played)):
            for stage, names in zip(stages, state[key], strict=False):
                played.append((stage, self._restored(names)))

    def resume(self, state: Mapping[str, Any], calls: Mapping[int, Call]) -> None:
        """Move the calls of a stage on to where an earlier run was in it."""
        for index, place in self._restored(state["hidden"]).items():
            calls[index].place = place
        for index, place in self._restored(state["reference"]).items():
            reference = calls[index].reference
            assert reference is not None
            reference.place = place
        for said, file in state["handed"].items():
            name, _, at = said.partition(" ")
            if workers.is_mine(int(at)):
                kept = self.activations.restore(file)
                for call in filter(None, (calls[int(at)], calls[int(at)].reference)):
                    call.handed[name] = kept

    def _restored(self, names: Mapping[str, str]) -> dict[int, Kept]:
        mine = {int(index): name for index, name in names.items() if workers.is_mine(int(index))}
        return {index: self.activations.restore(name) for index, name in mine.items()}

    def _catch(self, block: nn.Module, index: int, played: Played, hands_on: Sequence[str]) -> Call:
        caught: list[Call] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
            if hands_on:  # by name, for some of them are replaced
                names = list(signature(module.forward).parameters)[1:]
                rest, kwargs = (), kwargs | dict(zip(names, rest, strict=False))
            caught.append(Call(hidden, rest, kwargs, None, None, self.activations, hands_on, self.dtype))
            raise _Reached

        hook = block.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with ExitStack() as stubs:
                for stage, outputs in played:
                    if index in outputs:
                        stubs.enter_context(_playing(self.model, stage, outputs[index].read().to(self.device)))
                self.model(**_read(self._batches[index], self.device), use_cache=False)
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
    several = (None,) * len(stage[-1].hands_on)

    def hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *several) if several else hidden_states

    def play(*args: Any, **kwargs: Any) -> Any:
        return hand_on(output)

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(instead(block, play if block is last else hand_on))
        yield


def prepare(samples: Sequence[Sample], processor: ProcessorMixin, family: Family) -> list[Inputs]:
    """The model's inputs for samples (prompt and first answer), in batches of equal length, so that none is padded.

    An encoder-decoder's encoder reads the prompt and its decoder the answer, or where there is none, the prompt as
    well: the start of an answer alone would tell little of what the decoder computes.
    """
    return list(prepared(samples, processor, family, Activations()))


def prepared(
    samples: Sequence[Sample], processor: ProcessorMixin, family: Family, activations: Activations
) -> Iterator[Inputs]:
    """`prepare`, a batch at a time; meanwhile the samples wait in `activations`."""
    waiting: dict[tuple[int, int, bool], list[Any]] = {}
    for sample in samples:
        if sample.image is None and IMAGE_MARK not in family.question:
            raise VlmqError(f"{sample.id}: {family.name} reads no prompt without an image; leave text alone out")
        prompt, answer = prompt_of(sample, family), sample.answers[:1]
        text = prompt if family.start is not None else " ".join([prompt, *answer])
        image = None if sample.image is None else open_image(sample.image)
        inputs = dict(processor(images=image, text=text, return_tensors="pt"))
        if image is not None:
            check_image_tokens(processor, text, inputs["input_ids"][0].numpy())
        if family.start is not None:
            said = answer[0] if answer else prompt
            inputs["decoder_input_ids"] = decoder_inputs(said, processor, family.start)
        lengths = inputs["input_ids"].shape[1], inputs.get("decoder_input_ids", torch.empty(0, 0)).shape[1]
        waiting.setdefault((*lengths, image is None), []).append(_kept(inputs, activations))
    for (length, _, _), same in sorted(waiting.items()):
        while same:
            batch = [_read(inputs) for inputs in same[: together(length)]]
            del same[: together(length)]
            yield joined(batch)


def joined(batch: Sequence[Inputs]) -> Inputs:
    """Samples of equal shapes, one below the other."""
    return {key: torch.cat([inputs[key] for inputs in batch]) for key in batch[0]}


def decoder_inputs(text: str, processor: ProcessorMixin, start: int) -> Tensor:
    """What a decoder reads that says `text`: int64 (1, tokens + 1), without the token that ends it."""
    said = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([[start, *said]])


def together(tokens: int) -> int:
    """How many samples of so many tokens run together."""
    return max(1, min(BATCH, TOKENS // tokens))


def vision_tokens(batch: Inputs, config: PretrainedConfig) -> Tensor:
    """Which positions of a batch hold an image token: bool (batch, sequence)."""
    token = getattr(config, "image_token_id", None)
    return batch["input_ids"] == (config.image_token_index if token is None else token)


@dataclass(frozen=True)
class Wanted:
    """What is kept of one input: its sums, or nothing; besides, whether its rows, what the reference reads, and how
    much the tokens of the image count (text counts 1)."""

    sums: bool = True
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

    Statistics are those of all workers' batches; outputs are those of this worker's first batch, or of all of its.
    Where the full-precision model runs alongside, its calls move on to the next block.
    """
    wanted = wanted or [Wanted()] * len(block.inputs)
    module = model.get_submodule(block.name)
    device = _device(module)
    sums = [Sums(entry.sites[0].columns, device, want.cross) for entry, want in zip(block.inputs, wanted, strict=True)]
    keep = int(-(-ROWS // workers.number(len(calls))))
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
                if not want.sums:
                    continue
                weights = None
                if want.vision_weight != 1 and call.vision is not None:
                    weights = torch.where(call.vision.to(device), want.vision_weight, 1.0)
                sums[index].add(inputs[index], weights, references.get(index), keep if want.rows else 0)
    finally:
        for hook in hooks:
            hook.remove()
    return [found.statistics() for found in sums], outputs


def _device(block: nn.Module) -> torch.device:
    """Where a block's weights are."""
    return next(block.parameters()).device


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
