"""Does the model look? The same questions about another image, and about none: how many answers change.

A language model answers fluently whatever its vision tower hands it, so that text alone never shows a broken one. A
model that sees changes its answers as often as the reference does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from vlmq.exporter.evaluation.answers import Vlm

GREY = (128, 128, 128)


@dataclass(frozen=True)
class Shown:
    """Tokens of the answers to the same prompts: about the images, about one another's, about grey ones."""

    own: list[list[int]]
    swapped: list[list[int]]
    blank: list[list[int]]

    def changed(self) -> dict[str, float]:
        """Percent of the answers that another image changes; nothing to swap where there is one image alone."""
        if not self.own:
            return {}
        rates = {"blank": _changed(self.own, self.blank)}
        return {"swapped": _changed(self.own, self.swapped), **rates} if self.swapped else rates


def _changed(own: Sequence[list[int]], other: Sequence[list[int]]) -> float:
    return 100 * sum(one != two for one, two in zip(own, other, strict=True)) / len(own)


def shown(
    vlm: Vlm,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    own: list[list[int]] | None = None,
) -> Shown:
    """Images that are all different. own: the answers about them, where they are known."""

    def answers(pictures: Sequence[Image.Image]) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            answered = vlm.generate(list(pictures[part]), list(prompts[part]), max_new_tokens=max_new_tokens)
            found += [list(answer.tokens) for answer in answered]
        return found

    swapped = answers([*images[1:], images[0]]) if len(images) > 1 else []
    own = answers(images) if own is None else own
    return Shown(own, swapped, answers([Image.new("RGB", image.size, GREY) for image in images]))
