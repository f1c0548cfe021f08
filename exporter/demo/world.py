"""A small world to look at: pictures of one to four coloured shapes, each drawn from nothing but its number.

The picture of an id is the same bytes everywhere and always: chance comes from `random.Random(id).random()`, the
one stream that Python promises never to change, and shapes are rasterised here from signed distances.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 64  # pixels
CELL = SIDE // 2  # four cells, at most one thing in each, so that left and above are never in doubt

COLORS = {
    "red": (222, 45, 38),
    "green": (50, 175, 75),
    "blue": (45, 95, 235),
    "yellow": (242, 220, 45),
    "purple": (165, 60, 205),
    "white": (240, 240, 240),
}
RADII = {"small": (6.5, 8.0), "large": (11.0, 13.0)}  # pixels

Grid = NDArray[np.float64]


def _box(x: Grid, y: Grid, half_width: float, half_height: float) -> Grid:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _triangle(x: Grid, y: Grid, r: float) -> Grid:
    y = y - r / 4  # its box, not its centroid, sits on the centre
    return np.maximum(y, np.abs(x) * np.sqrt(0.75) - y / 2) - r / 2


# Signed distance in pixels from the outline, negative inside; offsets (x, y) from the centre, y downwards.
SHAPES: dict[str, Callable[[Grid, Grid, float], Grid]] = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: _box(x, y, 0.85 * r, 0.85 * r),
    "triangle": _triangle,
    "cross": lambda x, y, r: np.minimum(_box(x, y, r, 0.3 * r), _box(x, y, 0.3 * r, r)),
    "ring": lambda x, y, r: np.abs(np.hypot(x, y) - 0.74 * r) - 0.24 * r,
}


@dataclass(frozen=True)
class Thing:
    """One shape in a picture; lengths in pixels, y downwards."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def row(self) -> int:
        return int(self.y // CELL)

    @property
    def column(self) -> int:
        return int(self.x // CELL)


@dataclass(frozen=True)
class Scene:
    """What is in picture `id`: things in reading order, no two of the same colour and shape, on a shaded ground."""

    id: int
    things: tuple[Thing, ...]
    ground: tuple[tuple[float, ...], ...]  # RGB in two opposite corners

    def __post_init__(self) -> None:
        if len({thing.name for thing in self.things}) < len(self.things):
            raise ValueError(f"scene {self.id}: two things have the same name")


class Dice(random.Random):
    """Choices made from `random()` alone: the other methods of `Random` may change between Python versions."""

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def pick(self, options: Sequence):
        return options[int(self.random() * len(options))]

    def some(self, options: Sequence, count: int) -> list:
        """`count` different ones, in chance order."""
        left = list(options)
        return [left.pop(int(self.random() * len(left))) for _ in range(count)]


def scene_of(id: int, most: int = 4) -> Scene:
    """The scene of `id`, with at most `most` things."""
    dice = Dice(id)
    count = 1 + int(dice.random() * most)
    # A third of the scenes uses two colours, a third two shapes: else there would be little to count.
    colors = dice.some(list(COLORS), 2 if dice.random() < 1 / 3 else len(COLORS))
    shapes = dice.some(list(SHAPES), 2 if dice.random() < 1 / 3 else len(SHAPES))
    names = dice.some([(color, shape) for color in colors for shape in shapes], count)
    cells = sorted(dice.some(range(4), count))
    things = []
    for (color, shape), cell in zip(names, cells, strict=True):
        size = dice.pick(list(RADII))
        radius = dice.between(*RADII[size])
        margin = radius + 0.5
        x = CELL * (cell % 2) + dice.between(margin, CELL - margin)
        y = CELL * (cell // 2) + dice.between(margin, CELL - margin)
        things.append(Thing(color, shape, size, x, y, radius))
    corners = tuple(tuple(dice.between(15, 85) for _ in "rgb") for _ in range(2))
    return Scene(id, tuple(things), corners)


def picture_of(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene, edges smoothed over one pixel: (64, 64, 3) uint8."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    start, end = np.array(scene.ground)
    canvas = start + (end - start) * ((x + y) / (2 * SIDE))[..., None]
    for thing in scene.things:
        distance = SHAPES[thing.shape](x - thing.x, y - thing.y, thing.radius)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        canvas = canvas + cover * (np.array(COLORS[thing.color]) - canvas)
    return np.round(canvas).astype(np.uint8)
