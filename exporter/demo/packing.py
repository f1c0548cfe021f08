"""Training batches: one picture, its image tokens once, and many prompts with answers that all look at them.

A prompt follows the image tokens as if it were alone: a block mask hides the other prompts from it, and its positions
start again where the shared part ends. The logits are those of single samples, at a fifth of the work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmq.exporter.demo.models import EOS, IMAGE, IMAGE_TOKEN, PAD, Demo, Model, build_tokenizer
from vlmq.exporter.demo.questions import ASKED, Mix, captions_of, questions_about
from vlmq.exporter.demo.world import Scene, picture_of

_TOKENIZER = build_tokenizer()
_SHARED = 0
_NOTHING = -1
_ROUND = 16  # few different lengths: a CPU compiles its matrix products anew for each


@dataclass(frozen=True)
class Batch:
    """b pictures, each with one packed sequence of n tokens."""

    pixels: Tensor  # (b, 3, 64, 64) float, -1..1
    tokens: Tensor  # (b, n) int
    segments: Tensor  # (b, n) int: 0 what all prompts share, 1.. the prompts, -1 padding
    positions: Tensor  # (b, n) int
    answers: Tensor  # (b, n) bool: a token of an answer, its end included
    kinds: list[str]  # of every segment but the shared one, all pictures in a row

    def mask(self) -> Tensor:
        """What each token may look at, as an addend to attention scores: (b, 1, n, n) float."""
        n = self.tokens.shape[1]
        one, other = self.segments[:, :, None], self.segments[:, None, :]
        seen = ((one == other) | (other == _SHARED)) & torch.ones(n, n, dtype=torch.bool, device=one.device).tril()
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]

    def to(self, device: torch.device) -> Batch:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**moved, kinds=self.kinds)


def pixels_of(scenes: Iterable[Scene]) -> Tensor:
    """(b, 3, 64, 64) float, -1..1, equal to what the processors make of the pictures."""
    pictures = np.stack([picture_of(scene) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1


def pack(demo: Demo, scenes: list[Scene], questions: int, mix: Mix = ASKED) -> Batch:
    """Each scene with that many questions and its caption."""
    before, after = (_TOKENIZER.encode(text, add_special_tokens=False) for text in demo.prefix)
    shared = before + [IMAGE] * demo.image_tokens
    rows, kinds = [], []
    for scene in scenes:
        row = [(token, _SHARED, position, False) for position, token in enumerate(shared)]
        texts = [
            (demo.question.format(question=question.text), question.answer, question.answer_type)
            for question in questions_about(scene, questions, mix)
        ]
        texts.append((demo.caption, captions_of(scene)[0], "caption"))
        for segment, (prompt, answer, kind) in enumerate(texts, start=1):
            own = prompt.split(IMAGE_TOKEN)[-1]
            asked = after + _TOKENIZER.encode(own, add_special_tokens=False)
            said = [*_TOKENIZER.encode(answer, add_special_tokens=False), EOS]
            row += [
                (token, segment, len(shared) + place, place >= len(asked)) for place, token in enumerate(asked + said)
            ]
            kinds.append(kind)
        rows.append(row)
    length = -(-max(map(len, rows)) // _ROUND) * _ROUND
    padded = [row + [(PAD, _NOTHING, 0, False)] * (length - len(row)) for row in rows]
    tokens, segments, positions, answers = torch.tensor(padded).unbind(-1)
    return Batch(pixels_of(scenes), tokens, segments, positions, answers.bool(), kinds)


def logits_of(demo: Demo, model: Model, batch: Batch, image: Tensor) -> Tensor:
    """Next-token logits (b, n, vocabulary), given the image tokens (b, k, width) that the model made of the pixels."""
    embeds = model.get_input_embeddings()(batch.tokens)
    here = (batch.tokens == IMAGE).unsqueeze(-1)
    embeds = embeds.masked_scatter(here, image.to(embeds.dtype))
    return demo.read(model, inputs_embeds=embeds, attention_mask=batch.mask(), position_ids=batch.positions)


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of the answers' tokens, each predicted from the token before it."""
    wanted = batch.answers[:, 1:]
    return F.cross_entropy(logits[:, :-1][wanted].float(), batch.tokens[:, 1:][wanted])


def exact_matches(logits: Tensor, batch: Batch) -> list[bool]:
    """For every segment in a row, whether greedy generation would give exactly its answer."""
    right = (logits[:, :-1].argmax(-1) == batch.tokens[:, 1:]) | ~batch.answers[:, 1:]
    per_picture = len(batch.kinds) // len(batch.tokens)
    return [
        bool(row[segments == number].all())
        for row, segments in zip(right, batch.segments[:, 1:], strict=True)
        for number in range(1, per_picture + 1)
    ]
