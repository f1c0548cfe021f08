"""What can be asked and said about a scene: questions with one right answer each, and captions.

Every question is well posed (what it names exists once) and drawn so that its text alone says little about its answer:
"yes" is as likely as "no", and a thing that is not there is made of a colour and a shape that are, where possible.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from vlmq.exporter.demo.world import COLORS, RADII, SHAPES, Dice, Scene, Thing

PLACES = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}
CAPTION_REQUEST = "Describe the image."


@dataclass(frozen=True)
class Question:
    """A question, its answer, and VQAv2's two ways to group it."""

    text: str
    answer: str
    kind: str  # the words it starts with
    answer_type: str  # yes/no, number or other


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _once(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count == 1]


def _called(scene: Scene, thing: Thing, dice: Dice) -> str:
    """A name that only this thing has: "red circle", or "circle" or "red thing" where there is one such."""
    names = [thing.name]
    if [other.shape for other in scene.things].count(thing.shape) == 1:
        names.append(thing.shape)
    if [other.color for other in scene.things].count(thing.color) == 1:
        names.append(f"{thing.color} thing")
    return dice.pick(names)


def _is_there(scene: Scene, dice: Dice) -> Question:
    thing = dice.pick(scene.things)
    present = {other.name for other in scene.things}
    name = thing.name
    if dice.random() < 0.5:
        swaps = [f"{a.color} {b.shape}" for a in scene.things for b in scene.things]
        others = [f"{color} {thing.shape}" for color in COLORS] + [f"{thing.color} {shape}" for shape in SHAPES]
        confusable = [swap for swap in swaps if swap not in present]
        name = dice.pick(confusable or [other for other in others if other not in present])
    return Question(f"Is there a {name}?", _yes(name in present), "is there a", "yes/no")


def _is_there_shape(scene: Scene, dice: Dice) -> Question:
    present = {thing.shape for thing in scene.things}
    shape = dice.pick(sorted(present) if dice.random() < 0.5 else [name for name in SHAPES if name not in present])
    return Question(f"Is there a {shape}?", _yes(shape in present), "is there a", "yes/no")


def _is_there_color(scene: Scene, dice: Dice) -> Question:
    present = {thing.color for thing in scene.things}
    color = dice.pick(sorted(present) if dice.random() < 0.5 else [name for name in COLORS if name not in present])
    return Question(f"Is there a {color} thing?", _yes(color in present), "is there a", "yes/no")


def _is_color(scene: Scene, dice: Dice) -> Question | None:
    unique = _once([thing.shape for thing in scene.things])
    if not unique:
        return None
    shape = dice.pick(unique)
    truth = next(thing.color for thing in scene.things if thing.shape == shape)
    color = truth
    if dice.random() < 0.5:
        near = [thing.color for thing in scene.things if thing.color != truth]
        color = dice.pick(near or [other for other in COLORS if other != truth])
    return Question(f"Is the {shape} {color}?", _yes(color == truth), "is the", "yes/no")


def _is_beside(scene: Scene, dice: Dice) -> Question | None:
    if len(scene.things) < 2:
        return None
    one, two = dice.some(scene.things, 2)
    facts: list[tuple[str, bool]] = []
    if one.column != two.column:
        facts += [("left of", one.column < two.column), ("right of", one.column > two.column)]
    if one.row != two.row:
        facts += [("above", one.row < two.row), ("below", one.row > two.row)]
    relation, truth = dice.pick(facts)
    names = _called(scene, one, dice), _called(scene, two, dice)
    return Question(f"Is the {names[0]} {relation} the {names[1]}?", _yes(truth), "is the", "yes/no")


def _is_large(scene: Scene, dice: Dice) -> Question:
    thing = dice.pick(scene.things)
    return Question(f"Is the {_called(scene, thing, dice)} large?", _yes(thing.size == "large"), "is the", "yes/no")


def _count(scene: Scene, dice: Dice) -> Question:
    return Question("How many shapes are there?", str(len(scene.things)), "how many", "number")


def _count_color(scene: Scene, dice: Dice) -> Question:
    color = dice.pick([thing.color for thing in scene.things] if dice.random() < 0.7 else list(COLORS))
    number = sum(thing.color == color for thing in scene.things)
    return Question(f"How many {color} shapes are there?", str(number), "how many", "number")


def _count_shape(scene: Scene, dice: Dice) -> Question:
    shape = dice.pick([thing.shape for thing in scene.things] if dice.random() < 0.7 else list(SHAPES))
    number = sum(thing.shape == shape for thing in scene.things)
    return Question(f"How many {_plural(shape)} are there?", str(number), "how many", "number")


def _which_color(scene: Scene, dice: Dice) -> Question | None:
    unique = [thing for thing in scene.things if thing.shape in _once([other.shape for other in scene.things])]
    if not unique:
        return None
    thing = dice.pick(unique)
    return Question(f"What color is the {thing.shape}?", thing.color, "what color is the", "other")


def _which_shape(scene: Scene, dice: Dice) -> Question | None:
    unique = [thing for thing in scene.things if thing.color in _once([other.color for other in scene.things])]
    if not unique:
        return None
    thing = dice.pick(unique)
    return Question(f"What shape is the {thing.color} thing?", thing.shape, "what shape is the", "other")


def _where(scene: Scene, dice: Dice) -> Question:
    thing = dice.pick(scene.things)
    place = PLACES[thing.row, thing.column]
    return Question(f"Where is the {_called(scene, thing, dice)}?", place, "where is the", "other")


def _which_size(scene: Scene, dice: Dice) -> Question:
    thing = dice.pick(scene.things)
    return Question(f"What size is the {_called(scene, thing, dice)}?", thing.size, "what size is the", "other")


Mix = tuple[tuple[int, Callable[[Scene, Dice], Question | None]], ...]

# How often each is asked, in percent: when it counts, and in the lessons before, which dwell on what is learnt late
# (shapes and places; whatever goes by colour is learnt by itself).
ASKED: Mix = (
    (10, _is_there),
    (7, _is_there_shape),
    (5, _is_there_color),
    (9, _is_color),
    (5, _is_beside),
    (8, _is_large),
    (8, _count),
    (8, _count_color),
    (6, _count_shape),
    (10, _which_color),
    (10, _which_shape),
    (8, _where),
    (6, _which_size),
)
TAUGHT: Mix = (
    (12, _is_there),
    (18, _is_there_shape),
    (2, _is_there_color),
    (12, _is_color),
    (6, _is_beside),
    (5, _is_large),
    (1, _count),
    (3, _count_color),
    (10, _count_shape),
    (13, _which_color),
    (1, _which_shape),
    (14, _where),
    (3, _which_size),
)


def questions_about(scene: Scene, count: int, mix: Mix = ASKED) -> list[Question]:
    """`count` different questions, always the same ones for the same scene."""
    drawer = [ask for percent, ask in mix for _ in range(percent)]
    dice = Dice(scene.id + 1_000_003)  # not the stream that placed the things
    asked: dict[str, Question] = {}
    while len(asked) < count:
        question = dice.pick(drawer)(scene, dice)
        if question is not None:
            asked.setdefault(question.text, question)
    return list(asked.values())


def captions_of(scene: Scene) -> tuple[str, ...]:
    """Four true captions; the first is the one that a model is taught."""
    things = scene.things
    plain = _listed([f"a {thing.name}" for thing in things])
    sized = _listed([f"a {thing.size} {thing.name}" for thing in things])
    first = sized if len(things) == 1 else _pair(*things) if len(things) == 2 else plain
    noun = "shape" if len(things) == 1 else "shapes"
    return first, sized, f"there is {plain}", f"{len(things)} {noun}: {plain}"


def words() -> list[str]:
    """Every word and sign that questions, answers, captions and prompts are made of, sorted."""
    said = [
        "question: answer: user: assistant: a photo of",
        CAPTION_REQUEST,
        "yes no 0 1 2 3 4",
        "is there a? the left of right above below how many shapes are what color shape thing size where",
        "and, there is :",
        *PLACES.values(),
        *COLORS,
        *SHAPES,
        *map(_plural, SHAPES),
        *RADII,
    ]
    return sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(said).lower())))


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _listed(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _pair(*things: Thing) -> str:
    one, two = sorted(things, key=lambda thing: (thing.column, thing.row))
    relation = "left of" if one.column < two.column else "above"
    return f"a {one.name} {relation} a {two.name}"
