"""What stands in for the pretraining of CLIP, EVA and the Q-Former: naming each thing, and saying where it is.

End to end from scratch the vision tower never starts to see: answers reward it too late and too little. So the patch at
a thing's centre must tell the thing's colour, shape and size, and its own place: a Q-Former has nothing else to find
it by. BLIP-2's queries, four to a quarter of the picture, must tell what is in theirs. Last, the image tokens must
say the same in the language model's own words. Losses are averaged over things, not patches: among so many empty
patches the shapes would never be learnt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmq.exporter.demo.models import VOCABULARY
from vlmq.exporter.demo.world import CELL, COLORS, RADII, SHAPES, SIDE, Scene, Thing

_PROPERTIES = {"color": tuple(COLORS), "shape": tuple(SHAPES), "size": tuple(RADII)}
_HALVES = (("top", "bottom"), ("left", "right"))
_PATCH_ROWS = 8
_QUARTER_ROWS = SIDE // CELL


def _properties(thing: Thing) -> list[int]:
    return [options.index(getattr(thing, name)) for name, options in _PROPERTIES.items()]


def _centre(thing: Thing, rows: int) -> tuple[int, int]:
    """Row and column of the cell that holds the thing's centre, in a grid of rows x rows."""
    return int(thing.y * rows / SIDE), int(thing.x * rows / SIDE)


def _centres(features: Tensor, scenes: list[Scene]) -> tuple[list[int], list[int]]:
    """Picture and cell of every thing, for features (b, rows * rows, width) in reading order."""
    rows = int(features.shape[1] ** 0.5)
    pictures = [picture for picture, scene in enumerate(scenes) for _ in scene.things]
    places = [_centre(thing, rows) for scene in scenes for thing in scene.things]
    return pictures, [row * rows + column for row, column in places]


class Naming(nn.Module):
    """Linear readers of the cells of a square grid over the picture, thrown away after training."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.readers = nn.ModuleDict({name: nn.Linear(width, len(options)) for name, options in _PROPERTIES.items()})
        self.readers.update({name: nn.Linear(width, rows) for name in ("row", "column")})
        self.presence = nn.Linear(width, 1)

    def forward(self, features: Tensor, scenes: list[Scene]) -> Tensor:
        """features (b, rows * rows, width) in reading order  ->  the loss, a number"""
        centres = _centres(features, scenes)
        labels = [[*_properties(thing), *_centre(thing, self.rows)] for scene in scenes for thing in scene.things]
        there = torch.zeros(features.shape[:2], device=features.device)
        there[centres] = 1
        # Things weigh together as much as all the cells without one.
        weight = there / there.mean() + (1 - there) / (1 - there.mean()).clamp_min(1e-3)
        presence = self.presence(features)[..., 0].float()
        loss = F.binary_cross_entropy_with_logits(presence, there, weight) / 2
        targets = torch.tensor(labels, device=features.device).unbind(-1)
        for reader, target in zip(self.readers.values(), targets, strict=True):
            loss = loss + F.cross_entropy(reader(features[centres]).float(), target)
        return loss


class Supervision(nn.Module):
    """The naming losses of one model: of its patches and, where it has queries, of these."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.patches = Naming(width, _PATCH_ROWS)
        self.queries = Naming(width, _QUARTER_ROWS)

    def forward(self, patches: Tensor, queries: Tensor | None, scenes: list[Scene]) -> Tensor:
        """patches (b, 64, width), queries (b, 16, width) or None  ->  the loss, a number"""
        loss = self.patches(patches, scenes)
        if queries is None:
            return loss
        return loss + torch.stack([self.queries(one, scenes) for one in _by_quarter(queries)]).mean()


def wording(tokens: Tensor, words: Tensor, scenes: list[Scene]) -> Tensor:
    """The loss of image tokens in telling a thing by being closest to the words for it.

    tokens (b, 16 or 64, width), words (vocabulary, width) the input embeddings  ->  the loss, a number
    """
    grids = _by_quarter(tokens) if tokens.shape[1] < _PATCH_ROWS**2 else (tokens,)
    labels = [[*_properties(thing), thing.row, thing.column] for scene in scenes for thing in scene.things]
    targets = torch.tensor(labels, device=tokens.device).unbind(-1)
    loss = tokens.new_zeros(())
    for grid in grids:
        things = grid[_centres(grid, scenes)]
        for options, target in zip((*_PROPERTIES.values(), *_HALVES), targets, strict=True):
            closeness = things @ words[[VOCABULARY[option] for option in options]].T
            loss = loss + F.cross_entropy(closeness.float(), target) / len(grids)
    return loss


def _by_quarter(queries: Tensor) -> tuple[Tensor, ...]:
    """Queries (b, 16, width) as four grids (b, 4, width), each with one query for every quarter."""
    return queries.unflatten(1, (_QUARTER_ROWS**2, -1)).unbind(2)
