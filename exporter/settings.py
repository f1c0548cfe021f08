"""What a recipe says in one place: the values of its schema, checked at birth.

None leaves a value as the places before it made it. Activations and options are laid over one another key by key.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from vlmq.exporter.families import Component, Kind
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.scheme import Options
from vlmq.exporter.walk import Site
from vlmq.kernels.grid import BITS, ROW, TENSOR, Grid

FULL = 16  # bits that mean "left alone"
INPUT_BITS = (4, 6, 8)
SELECTORS = ("match", "component", "blocks", "kind")

Third = Literal["front", "middle", "end"]


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    return name


def _known_bits(bits: int) -> int:
    if bits not in (*BITS, FULL):
        raise ValueError(f"{bits} bits; choose one of {', '.join(map(str, BITS))}, or {FULL} to leave alone")
    return bits


def _known_input_bits(bits: int) -> int:
    if bits not in (*INPUT_BITS, FULL):
        raise ValueError(f"{bits} bits for inputs; choose {', '.join(map(str, INPUT_BITS))}, or none to leave alone")
    return bits


def _known_group(group: int) -> int:
    Grid(bits=4, group=group)
    return group


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from error
    return text


def _worded(words: dict[str, int]) -> tuple[BeforeValidator, PlainSerializer]:
    """Numbers that a person reads and writes as words."""
    by_number = {number: word for word, number in words.items()}
    return (
        BeforeValidator(lambda value: words.get(str(value), value)),
        PlainSerializer(lambda number: by_number.get(number, number)),
    )


_of_weights, _weight_words = _worded({"row": ROW, "tensor": TENSOR})
_of_inputs, _input_words = _worded({"token": ROW, "tensor": TENSOR})
_said = PlainSerializer(lambda model: model.model_dump(mode="json", exclude_unset=True))

MethodName = Annotated[str, AfterValidator(_known_method)]
Bits = Annotated[int, AfterValidator(_known_bits)]
InputBits = Annotated[int, AfterValidator(_known_input_bits)]
GroupSize = Annotated[int, _of_weights, AfterValidator(_known_group), _weight_words]
InputGroupSize = Annotated[int, _of_inputs, AfterValidator(_known_group), _input_words]


class Activations(BaseModel):
    """How inputs are rounded; None leaves it as it was, and the word `none` (16 bits) does not round."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: InputBits | None = None
    group_size: InputGroupSize | None = None
    symmetric: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        if value == "none":
            return {"bits": FULL}
        return {key: said for key, said in value.items() if said is not None} if isinstance(value, dict) else value

    @model_serializer(mode="wrap")
    def _to_word(self, dump: SerializerFunctionWrapHandler) -> Any:
        return "none" if self.bits == FULL and self.model_fields_set == {"bits"} else dump(self)

    @property
    def grid(self) -> Grid | None:
        """The grid of an input: per token and symmetric unless said otherwise; None: inputs are not rounded."""
        if self.bits in (None, FULL):
            return None
        return Grid(self.bits, ROW if self.group_size is None else self.group_size, self.symmetric is not False)


class Settings(BaseModel):
    """What a component or a rule changes; None leaves it as it was. Activations and options change key by key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: MethodName | None = None
    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    activations: Activations | None = None
    options: Annotated[Options, _said] | None = None


class Table(BaseModel):
    """What the token embedding becomes; None: as the recipe has it. It is rounded to nearest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None


class Rule(Settings):
    """Settings for the sites that every selector given selects."""

    match: Annotated[str, AfterValidator(_pattern)] | None = None  # a regular expression found in the in-memory name
    component: Component | None = None
    blocks: Third | None = None  # of the site's stage
    kind: Kind | None = None

    @model_validator(mode="after")
    def _selects(self) -> "Rule":
        if not self.selectors:
            raise ValueError("a rule must say what it is for; give match, component, blocks or kind")
        return self

    @model_serializer(mode="wrap")
    def _selectors_first(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content = dump(self)
        return {key: content[key] for key in SELECTORS if key in content} | content

    @property
    def selectors(self) -> dict[str, str]:
        said = {key: getattr(self, key) for key in SELECTORS}
        return {key: value for key, value in said.items() if value is not None}

    def selects(self, site: Site, third: Third) -> bool:
        """Do all selectors hold for the site, which is in that third of its stage's blocks?"""
        return (
            site.kind not in ("embedding", "head")  # which have keys of their own
            and (self.match is None or bool(re.search(self.match, site.name)))
            and self.component in (None, site.component)
            and self.blocks in (None, third)
            and self.kind in (None, site.kind)
        )


Changed = TypeVar("Changed", Activations, Options)


def laid_over(base: Changed, change: Changed | None) -> Changed:
    """`base` with what `change` says laid over it, key by key."""
    return base.model_copy(update={key: getattr(change, key) for key in change.model_fields_set}) if change else base
