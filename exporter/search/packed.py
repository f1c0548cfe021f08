"""Many questions about few images, answered fast and as `TorchVlm` answers them.

What the questions about an image share is computed once: the image's features (`features.py`), and the language model's
run over all that prompts have in common, the image first, which is the trunk of a tree of tokens (`packing.py`). What
follows the last block's attention is computed only where an answer is told. The expected answer follows its question as
a draft: where every token of it is the model's own greedy choice, as it mostly is, nothing is left to generate
(speculative decoding; Leviathan et al. 2023, arXiv 2211.17192, section 2.1, with a draft that costs nothing). Elsewhere
the answer goes on from the first token that differs, greedily, a token at a time.

A token's logits depend on the order of sums, so where inputs are rounded, a value on the edge between two levels may
fall on the other side than in `TorchVlm`: then single answers differ, on either side of the truth.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import vqa
from vlmq.exporter.evaluation.answers import MAX_NEW_TOKENS, images_of
from vlmq.exporter.load import load
from vlmq.exporter.runtime import TorchVlm, open_processor
from vlmq.exporter.samples import Sample, prompt_of
from vlmq.exporter.search.features import Features
from vlmq.exporter.search.packing import Packed, Path, pack

# transformers 5.24 renames the argument; the older ones that vlmq supports know this name alone.
warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)

IMAGES = 16  # of a batch of packed sequences; what is fastest on one thread
HIDDEN = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Language:
    """Where a family's text decoder is, the head that reads its last hidden states, and in its blocks what looks at
    every token by itself: linears alone, and some that open what another closes."""

    decoder: str
    head: str
    blocks: str
    alone: str
    opening: tuple[str, ...]
    closing: str


LANGUAGE = {
    "blip-2": Language(
        "language_model.model", "language_model.lm_head", "decoder.layers", "self_attn.out_proj", ("fc1",), "fc2"
    ),
    "llava": Language(
        "model.language_model",
        "lm_head",
        "layers",
        "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
    ),
}


@dataclass(frozen=True)
class Scores:
    """What a model answered: tokens, texts, and the logits that tell it.

    logits: of each answer's first token (questions, vocabulary), or, where all are told, of every token of its draft,
    one question's behind the other's. float32; `told` says how many each question has.
    """

    tokens: list[list[int]]
    texts: list[str]
    right: np.ndarray  # (questions,) float64: VQA accuracy, 0 to 1
    logits: np.ndarray
    told: np.ndarray  # (questions,) int


class Scorer:
    """Asks any number of models of one family the same questions; whatever no model changes is prepared here, once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Sequence[Sample],
        model: PreTrainedModel | None = None,
        longest: int = MAX_NEW_TOKENS,
        tell_all: bool = False,
    ) -> None:
        """model: any of the family's, where one is in memory already; it tells where answers end.

        longest: tokens of an answer. tell_all: whether the logits of every token of a draft are wanted.

        VlmqError for an encoder-decoder, which has no one sequence to pack.
        """
        if checkpoint.family.start is not None:
            raise VlmqError(
                f"{checkpoint.name}: an encoder-decoder cannot be swept: question and answer are not one sequence; "
                "score exports of it with vlmq evaluate"
            )
        vlm = TorchVlm(model or load(checkpoint.folder), open_processor(checkpoint.folder))
        self.samples, self.longest, self.tell_all = samples, longest, tell_all
        self.processor, self.stop = vlm.processor, vlm.stop
        self.language = LANGUAGE[checkpoint.family.name]
        images = images_of(samples)
        first: dict[int, int] = {}  # an image -> its first question
        for place, image in enumerate(images):
            first.setdefault(id(image), place)
        numbers = {image: number for number, image in enumerate(first)}
        self.image = np.array([numbers[id(image)] for image in images])  # of each question
        prompts = [prompt_of(sample, checkpoint.family) for sample in samples]
        encoded = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        pixels = encoded["pixel_values"][list(first.values())]
        self.features = Features(pixels, checkpoint.family.name, (self.language.decoder, self.language.head))
        padded = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
        self.prompts = [row[seen].tolist() for row, seen in padded]
        self.mark = self.processor.tokenizer.convert_tokens_to_ids(str(self.processor.image_token))
        end = min(self.stop)
        self.drafts = [
            [*self.processor.tokenizer.encode(sample.answers[0], add_special_tokens=False), end][:longest]
            for sample in samples
        ]
        self.told = np.array([len(draft) if tell_all else 1 for draft in self.drafts])  # logits of each
        self.batches = list(self._pack(end))

    def _pack(self, padding: int) -> Iterator[Packed]:
        start = len(self.prompts[0]) - self.prompts[0][::-1].index(self.mark)  # the first token after the image
        shared = self.prompts[0][:start]
        if any(prompt[:start] != shared or self.mark in prompt[start:] for prompt in self.prompts):
            raise VlmqError(
                f"{self.samples[0].id}: prompts that differ before their image cannot be scored together; "
                "give questions, which the model's own template frames"
            )
        asked: list[list[Path]] = [[] for _ in self.features.pixels]
        for place, image in enumerate(self.image):
            asked[image].append(Path(place, self.prompts[place], self.drafts[place]))
        return pack(asked, IMAGES, padding)

    @torch.no_grad()
    def score(self, model: PreTrainedModel) -> Scores:
        """Everything about all of the questions, in their order."""
        features = self.features.of(model)
        tokens: list[list[int]] = [[] for _ in self.samples]
        vocabulary = len(model.get_parameter(f"{self.language.head}.weight"))
        logits = np.empty((self.told.sum(), vocabulary), np.float32)
        for batch in self.batches:
            self._answer(model, batch.to(model.device), features, tokens, logits)
        texts = [self.processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
        right = np.array([vqa.accuracy(text, sample.answers) for text, sample in zip(texts, self.samples, strict=True)])
        return Scores(tokens, texts, right, logits, self.told)

    def _answer(
        self, model: PreTrainedModel, batch: Packed, features: Tensor, tokens: list[list[int]], logits: np.ndarray
    ) -> None:
        """Answer a batch into `tokens` and `logits`."""
        cache: Any = DynamicCache()
        embeds = model.get_input_embeddings()(batch.tokens)
        here = (batch.tokens == self.mark).unsqueeze(-1)
        embeds = embeds.masked_scatter(here, features[torch.tensor(batch.images)])
        mask = batch.mask(HIDDEN)
        rows, told = batch.rows[:, None], batch.told
        wanted = torch.zeros_like(batch.tokens, dtype=torch.bool)
        wanted[rows, told] = True
        with self._last_block_on(model, wanted):
            hidden = self._decode(model, embeds, mask, batch.positions, cache)
        found = model.get_submodule(self.language.head)(hidden[rows, told])  # (questions, steps, vocabulary)
        choices = found.argmax(-1).tolist()
        begins = self.told.cumsum() - self.told
        unfinished = []
        for number, place in enumerate(batch.places):
            begin, count = begins[place], self.told[place]
            logits[begin : begin + count] = found[number, :count].cpu().numpy()
            for choice, draft in zip(choices[number], self.drafts[place], strict=False):
                if choice in self.stop:
                    break
                tokens[place].append(choice)
                if choice != draft:
                    unfinished.append(number)
                    break
        if unfinished:
            places = [batch.places[number] for number in unfinished]
            # A draft is right but for the last token found, which the sequence does not hold: that one is fed.
            held = torch.tensor([len(tokens[place]) - 1 for place in places])
            left = torch.tensor(unfinished)
            self._go_on(model, cache, mask, batch.rows[left], told[left, held], batch, places, tokens)

    @contextmanager
    def _last_block_on(self, model: PreTrainedModel, wanted: Tensor) -> Iterator[None]:
        """Meanwhile the last block does what follows its attention for the wanted tokens alone, (b, n) bool.

        Nothing reads what it puts out at the others. Not so where inputs are rounded, whose range may be of all tokens.
        """
        language = self.language
        block = model.get_submodule(language.decoder).get_submodule(language.blocks)[-1]  # type: ignore[index]
        alone, closing = block.get_submodule(language.alone), block.get_submodule(language.closing)
        opening = [block.get_submodule(name) for name in language.opening]
        if any(part._forward_pre_hooks for part in (alone, closing, *opening)):
            yield
            return
        flat = wanted.flatten().nonzero()[:, 0]

        shapes = [wanted.shape]  # some decoders flatten what opens the block's second half

        def narrow(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            shapes[0] = args[0].shape[:-1]
            return (args[0].flatten(0, -2)[flat],)

        def widen(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            wide = output.new_zeros(wanted.numel(), output.shape[-1])
            return wide.index_copy_(0, flat, output).unflatten(0, shapes[0])

        with ExitStack() as hooks:
            for part in (alone, *opening):
                hooks.callback(part.register_forward_pre_hook(narrow).remove)
            for part in (alone, closing):
                hooks.callback(part.register_forward_hook(widen).remove)
            yield

    def _go_on(
        self,
        model: PreTrainedModel,
        cache: Any,
        mask: Tensor,
        rows: Tensor,
        ends: Tensor,
        batch: Packed,
        places: list[int],
        tokens: list[list[int]],
    ) -> None:
        """Greedy steps for questions of which each has `tokens`, the last of them not in the cache.

        rows, ends (questions,): where in the batch each one's last token in the cache is.
        """
        cache.batch_select_indices(rows)
        seen = mask[rows, :, ends][:, :, None]  # (questions, 1, 1, n)
        positions = batch.positions[rows, ends][:, None] + 1
        running = torch.tensor([len(tokens[place]) < self.longest for place in places])
        while running.any():
            kept = running.nonzero()[:, 0]
            if len(kept) < len(places):
                cache.batch_select_indices(kept)
                seen, positions, places = seen[kept], positions[kept], [places[index] for index in kept.tolist()]
            seen = torch.nn.functional.pad(seen, (0, 1))
            said = torch.tensor([[tokens[place][-1]] for place in places], device=model.device)
            hidden = self._decode(model, model.get_input_embeddings()(said), seen, positions, cache)
            choices = model.get_submodule(self.language.head)(hidden[:, -1]).argmax(-1).tolist()
            for place, choice in zip(places, choices, strict=True):
                if choice not in self.stop:
                    tokens[place].append(choice)
            positions = positions + 1
            running = torch.tensor(
                [
                    choice not in self.stop and len(tokens[place]) < self.longest
                    for place, choice in zip(places, choices, strict=True)
                ]
            )

    def _decode(self, model: PreTrainedModel, embeds: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """embeds (b, n, width), mask (b, 1, n, past + n), positions (b, n)  ->  hidden (b, n, width); grows `cache`."""
        decoder = model.get_submodule(self.language.decoder)
        return decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
