"""Questions about an image as one sequence: a tree of tokens whose trunk they share, each question a path in it.

A token stands at the position that it has in its own prompt, and sees the path from the trunk to itself and nothing
else. What several questions begin with is there once, the image's tokens first of all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

NONE = 0  # the question of a token that fills a sequence up


@dataclass(frozen=True)
class Path:
    """A question: its prompt, and a draft of its answer. place: among all questions."""

    place: int
    prompt: Sequence[int]
    draft: Sequence[int]

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.prompt, *self.draft[:-1])  # nothing follows the draft's last


@dataclass(frozen=True)
class Tree:
    """The questions about one image. first, last: of the questions 1.. that run through a token; they are in a row."""

    tokens: list[int]
    positions: list[int]
    first: list[int]
    last: list[int]
    places: list[int]
    told: list[list[int]]  # of each question, where what tells its answer is: its prompt's end, and its draft


def grow(paths: Sequence[Path]) -> Tree:
    """Depth first, so that a token comes after all that it sees."""
    tree = Tree([], [], [], [], [], [])
    nodes: list[int] = []  # the path before
    said: tuple[int, ...] = ()
    for question, path in enumerate(sorted(paths, key=lambda path: path.tokens), start=1):
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(said, path.tokens, strict=False)))
        said = path.tokens
        for node in nodes[:shared]:
            tree.last[node] = question
        new = range(len(tree.tokens), len(tree.tokens) + len(said) - shared)
        nodes = [*nodes[:shared], *new]
        tree.tokens.extend(said[shared:])
        tree.positions.extend(range(shared, len(said)))
        tree.first.extend(question for _ in new)
        tree.last.extend(question for _ in new)
        tree.places.append(path.place)
        tree.told.append(nodes[len(path.prompt) - 1 :])
    return tree


@dataclass(frozen=True)
class Packed:
    """The trees of b images as sequences of n tokens, and the q questions in them."""

    images: list[int]  # their places among the pixels
    tokens: Tensor  # (b, n) int
    positions: Tensor  # (b, n) int
    first: Tensor  # (b, n) int
    last: Tensor  # (b, n) int
    places: list[int]  # of the questions
    rows: Tensor  # (q,) int: their sequences
    told: Tensor  # (q, steps) int: where in it; behind a draft's end its last token again

    def to(self, device: torch.device) -> "Packed":
        """The same, its tensors on a device."""
        moved: Any = {name: each.to(device) for name, each in vars(self).items() if isinstance(each, Tensor)}
        return replace(self, **moved)

    def mask(self, hidden: float) -> Tensor:
        """What each token may look at, as an addend to attention scores, `hidden` where not: (b, 1, n, n) float."""
        asking = self.first[:, :, None]
        through = (self.first[:, None, :] <= asking) & (asking <= self.last[:, None, :])
        seen = through & (self.positions[:, None, :] <= self.positions[:, :, None])
        return torch.where(seen, 0.0, hidden)[:, None]


def pack(asked: Sequence[Sequence[Path]], images: int, padding: int) -> Iterator[Packed]:
    """Batches of so many images, of sequences of about equal length. asked: of each image."""
    trees = [grow(paths) for paths in asked]
    order = sorted(range(len(trees)), key=lambda image: -len(trees[image].tokens))
    for begin in range(0, len(order), images):
        chosen = order[begin : begin + images]
        batch = [trees[image] for image in chosen]
        longest = max(len(tree.tokens) for tree in batch)
        steps = max(len(told) for tree in batch for told in tree.told)

        def filled(values: Sequence[list[int]], filler: int, longest: int = longest) -> Tensor:
            return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

        yield Packed(
            chosen,
            filled([tree.tokens for tree in batch], padding),
            filled([tree.positions for tree in batch], 0),
            filled([tree.first for tree in batch], NONE),
            filled([tree.last for tree in batch], NONE),
            [place for tree in batch for place in tree.places],
            torch.tensor([row for row, tree in enumerate(batch) for _ in tree.told]),
            torch.tensor([told + [told[-1]] * (steps - len(told)) for tree in batch for told in tree.told]),
        )
