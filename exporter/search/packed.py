"""Many questions about few images, answered fast and as `TorchVlm` answers them.

What the questions about an image share is computed once: the image's features, and the language model's run over the
prompt up to the image. The questions follow it in one sequence, hidden from one another by a block mask, each at the
positions it has alone (as `exporter/demo/packing.py` trains). The expected answer follows its question as a draft:
where every token of it is the model's own greedy choice, as it mostly is, nothing is left to generate (speculative
decoding; Leviathan et al. 2023, arXiv 2211.17192, section 2.1, with a draft that costs nothing). Elsewhere the answer
goes on from the first token that differs, greedily, a token at a time.

A token's logits depend on the order of sums, so where inputs are rounded, a value on the edge between two levels may
fall on the other side than in `TorchVlm`: then single answers differ, on either side of the truth.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import vqa
from vlmq.exporter.evaluation.answers import MAX_NEW_TOKENS, images_of
from vlmq.exporter.load import load
from vlmq.exporter.runtime import TorchVlm, open_processor
from vlmq.exporter.samples import Sample, prompt_of

# transformers 5.24 renames the argument; the older ones that vlmq supports know this name alone.
warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)

IMAGES = 16  # of a batch of packed sequences; what is fastest on one thread
PIXELS = 32  # images of a batch of the vision encoder
REMEMBERED = 4  # models whose image features are kept: those that leave vision and connector alone share them
SHARED, NOTHING = 0, -1
HIDDEN = torch.finfo(torch.float32).min

# Of each family: the text decoder, and the head that reads its last hidden states.
LANGUAGE = {"blip-2": ("language_model.model", "language_model.lm_head"), "llava": ("model.language_model", "lm_head")}


@dataclass(frozen=True)
class Scores:
    """What a model answered: tokens, texts, how right, and the logits of each answer's first token."""

    tokens: list[list[int]]
    texts: list[str]
    right: np.ndarray  # (questions,) float64: 0 to 1
    logits: np.ndarray  # (questions, vocabulary) float32


@dataclass(frozen=True)
class Packed:
    """b images, each with one sequence of n tokens: what its questions share, then question and draft, one by one."""

    images: list[int]  # their places among the pixels
    questions: list[list[int]]  # of each image
    tokens: Tensor  # (b, n) int
    segments: Tensor  # (b, n) int: SHARED, or 1.. for the questions, or NOTHING
    positions: Tensor  # (b, n) int
    ends: list[list[int]]  # of each image, where each question's prompt ends

    def mask(self) -> Tensor:
        """What each token may look at, as an addend to attention scores: (b, 1, n, n) float."""
        n = self.tokens.shape[1]
        one, other = self.segments[:, :, None], self.segments[:, None, :]
        seen = ((one == other) | (other == SHARED)) & torch.ones(n, n, dtype=torch.bool).tril()
        return torch.where(seen, 0.0, HIDDEN)[:, None]


class Scorer:
    """Asks any number of models of one family the same questions; whatever no model changes is prepared here, once."""

    def __init__(self, checkpoint: Checkpoint, samples: Sequence[Sample], model: PreTrainedModel | None = None) -> None:
        """model: any of the family's, where one is in memory already; it tells where answers end.

        VlmqError for an encoder-decoder, which has no one sequence to pack.
        """
        if checkpoint.family.start is not None:
            raise VlmqError(
                f"{checkpoint.name}: an encoder-decoder cannot be swept: question and answer are not one sequence; "
                "score exports of it with vlmq evaluate"
            )
        vlm = TorchVlm(model or load(checkpoint.folder), open_processor(checkpoint.folder))
        self.samples, self.processor, self.stop = samples, vlm.processor, vlm.stop
        self.decoder, self.head = LANGUAGE[checkpoint.family.name]
        images = images_of(samples)
        first: dict[int, int] = {}  # an image -> its first question
        for place, image in enumerate(images):
            first.setdefault(id(image), place)
        numbers = {image: number for number, image in enumerate(first)}
        self.image = np.array([numbers[id(image)] for image in images])  # of each question
        prompts = [prompt_of(sample, checkpoint.family) for sample in samples]
        encoded = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        self.pixels = encoded["pixel_values"][list(first.values())]
        padded = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
        self.prompts = [row[seen].tolist() for row, seen in padded]
        self.mark = self.processor.tokenizer.convert_tokens_to_ids(str(self.processor.image_token))
        end = min(self.stop)
        self.drafts = [
            [*self.processor.tokenizer.encode(sample.answers[0], add_special_tokens=False), end][:MAX_NEW_TOKENS]
            for sample in samples
        ]
        self.batches = list(self._pack(end))
        self.features: OrderedDict[str, Tensor] = OrderedDict()

    def _pack(self, padding: int) -> Iterator[Packed]:
        """Every question, in batches of sequences of about equal length."""
        start = len(self.prompts[0]) - self.prompts[0][::-1].index(self.mark)  # the first token after the image
        shared = self.prompts[0][:start]
        if any(prompt[:start] != shared or self.mark in prompt[start:] for prompt in self.prompts):
            raise VlmqError(
                f"{self.samples[0].id}: prompts that differ before their image cannot be scored together; "
                "give questions, which the model's own template frames"
            )
        asked = [np.flatnonzero(self.image == image).tolist() for image in range(len(self.pixels))]
        lengths = [sum(len(self.prompts[place]) + len(self.drafts[place]) for place in places) for places in asked]
        order = sorted(range(len(asked)), key=lambda image: -lengths[image])
        for begin in range(0, len(order), IMAGES):
            images = order[begin : begin + IMAGES]
            rows: list[list[tuple[int, int, int]]] = []
            ends: list[list[int]] = []
            for image in images:
                row = [(token, SHARED, position) for position, token in enumerate(shared)]
                ends.append([])
                for segment, place in enumerate(asked[image], start=1):
                    own = self.prompts[place][start:]
                    ends[-1].append(len(row) + len(own) - 1)
                    row += [
                        (token, segment, start + step)
                        for step, token in enumerate([*own, *self.drafts[place][:-1]])  # nothing follows the end
                    ]
                rows.append(row)
            longest = max(map(len, rows))
            padded = [row + [(padding, NOTHING, 0)] * (longest - len(row)) for row in rows]
            tokens, segments, positions = torch.tensor(padded).unbind(-1)
            yield Packed(images, [asked[image] for image in images], tokens, segments, positions, ends)

    @torch.inference_mode()
    def score(self, model: PreTrainedModel) -> Scores:
        """Everything about all of the questions, in their order."""
        features = self._features(model)
        tokens: list[list[int]] = [[] for _ in self.samples]
        vocabulary = len(model.get_parameter(f"{self.head}.weight"))
        logits = np.empty((len(self.samples), vocabulary), np.float32)
        for batch in self.batches:
            self._answer(model, batch, features, tokens, logits)
        texts = [self.processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
        right = np.array([vqa.accuracy(text, sample.answers) for text, sample in zip(texts, self.samples, strict=True)])
        return Scores(tokens, texts, right, logits)

    def _features(self, model: PreTrainedModel) -> Tensor:
        """(images, image tokens, width), kept for models of equal vision encoder and connector."""
        key = self._fingerprint(model)
        if key is not None and key in self.features:
            self.features.move_to_end(key)
            return self.features[key]
        parts = []
        for start in range(0, len(self.pixels), PIXELS):
            some = self.pixels[start : start + PIXELS]
            found = model.get_image_features(some, return_dict=True).pooler_output  # type: ignore[operator]
            parts.append(found if isinstance(found, Tensor) else torch.stack(list(found)))
        features = torch.cat(parts)
        if key is not None:
            self.features[key] = features
            if len(self.features) > REMEMBERED:
                self.features.popitem(last=False)
        return features

    def _fingerprint(self, model: PreTrainedModel) -> str | None:
        """Of all that makes image features; None where hooks change what modules compute."""
        digest = hashlib.sha256()
        for name, module in model.named_modules():
            if f"{name}.".startswith((f"{self.decoder}.", f"{self.head}.")):
                continue
            if module._forward_pre_hooks or module._forward_hooks:
                return None
            digest.update(f"{name} {type(module).__name__}\n".encode())
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                digest.update(tensor.detach().numpy().tobytes())
        return digest.hexdigest()

    def _answer(
        self, model: PreTrainedModel, batch: Packed, features: Tensor, tokens: list[list[int]], logits: np.ndarray
    ) -> None:
        """Answer a batch into `tokens` and `logits`."""
        cache: Any = DynamicCache()
        embeds = model.get_input_embeddings()(batch.tokens)
        here = (batch.tokens == self.mark).unsqueeze(-1)
        embeds = embeds.masked_scatter(here, features[batch.images])
        mask = batch.mask()
        hidden = self._decode(model, embeds, mask, batch.positions, cache)
        spoken = [
            (row, end, place)
            for row, (places, ends) in enumerate(zip(batch.questions, batch.ends, strict=True))
            for place, end in zip(places, ends, strict=True)
        ]
        steps = max(len(self.drafts[place]) for _, _, place in spoken)
        rows = torch.tensor([row for row, _, _ in spoken])
        ends = torch.tensor([end for _, end, _ in spoken])
        last = hidden.shape[1] - 1
        wanted = (ends[:, None] + torch.arange(steps)).clamp(max=last)  # past a draft's end: not looked at
        found = model.get_submodule(self.head)(hidden[rows[:, None], wanted])  # (questions, steps, vocabulary)
        choices = found.argmax(-1).tolist()
        unfinished = []
        for number, (_, _, place) in enumerate(spoken):
            logits[place] = found[number, 0].numpy()
            for choice, draft in zip(choices[number], self.drafts[place], strict=False):
                if choice in self.stop:
                    break
                tokens[place].append(choice)
                if choice != draft:
                    unfinished.append(number)
                    break
        if unfinished:
            places = [spoken[number][2] for number in unfinished]
            # A draft is right but for the last token found, which the sequence does not hold: that one is fed.
            held = torch.tensor([len(tokens[place]) - 1 for place in places])
            self._go_on(model, cache, mask, rows[unfinished], ends[unfinished] + held, batch, places, tokens)

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
        running = torch.tensor([len(tokens[place]) < MAX_NEW_TOKENS for place in places])
        while running.any():
            kept = running.nonzero()[:, 0]
            if len(kept) < len(places):
                cache.batch_select_indices(kept)
                seen, positions, places = seen[kept], positions[kept], [places[index] for index in kept.tolist()]
            seen = torch.nn.functional.pad(seen, (0, 1))
            said = torch.tensor([[tokens[place][-1]] for place in places])
            hidden = self._decode(model, model.get_input_embeddings()(said), seen, positions, cache)
            choices = model.get_submodule(self.head)(hidden[:, -1]).argmax(-1).tolist()
            for place, choice in zip(places, choices, strict=True):
                if choice not in self.stop:
                    tokens[place].append(choice)
            positions = positions + 1
            running = torch.tensor(
                [
                    choice not in self.stop and len(tokens[place]) < MAX_NEW_TOKENS
                    for place, choice in zip(places, choices, strict=True)
                ]
            )

    def _decode(self, model: PreTrainedModel, embeds: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """embeds (b, n, width), mask (b, 1, n, past + n), positions (b, n)  ->  hidden (b, n, width); grows `cache`."""
        decoder = model.get_submodule(self.decoder)
        return decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
