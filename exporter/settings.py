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
    ValidationError,
    model_serializer,
    model_validator,
)

from vlmq.exporter.families import COMPONENTS, Component
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.scheme import Options
from vlmq.exporter.walk import Site
from vlmq.kernels.grid import BITS, ROW, TENSOR, Grid

FULL = 16  # bits that mean "left alone"
INPUT_BITS = (4, 6, 8)
SELECTORS = ("match", "component", "blocks", "kind")


# remedies
OF_BITS = f"choose one of {', '.join(map(str, BITS))}, or {FULL} to leave alone"
OF_INPUT_BITS = f"choose {', '.join(map(str, INPUT_BITS))}, or none to leave alone"
OF_WEIGHTS = "choose a multiple of 16 from 16 to 256, or row, or tensor"
OF_INPUTS = "choose a multiple of 16 from 16 to 256, or token, or tensor"

Third = Literal["front", "middle", "end"]
RuleKind = Literal["attention", "feedforward", "projection"]  # the head and the embedding have keys of their own


def _known_method(name: object) -> str:
    if str(name) not in METHODS:
        raise ValueError(f"unknown method {str(name)!r}; choose one of {', '.join(METHODS)}")
    return str(name)


def _known_bits(bits: int) -> int:
    if bits not in (*BITS, FULL):
        raise ValueError(f"{bits} bits; {OF_BITS}")
    return bits


def _known_input_bits(bits: int) -> int:
    if bits not in (*INPUT_BITS, FULL):
        raise ValueError(f"{bits} bits for inputs; {OF_INPUT_BITS}")
    return bits


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from error
    return text


def _worded(words: dict[str, int], remedy: str) -> tuple[BeforeValidator, PlainSerializer]:
    """Numbers that a person reads and writes as words; the remedy is for what is neither."""
    by_number = {number: word for word, number in words.items()}

    def number(value: object) -> int:
        try:
            return words[str(value)] if str(value) in words else int(str(value))
        except ValueError:
            raise ValueError(f"{value!r}; {remedy}") from None

    return BeforeValidator(number), PlainSerializer(lambda number: by_number.get(number, number))


def _grouped(remedy: str) -> AfterValidator:
    """Groups that a grid can have; the remedy is for others."""

    def known(group: int) -> int:
        try:
            return Grid(bits=4, group=group).group
        except ValueError:
            raise ValueError(f"a group of {group} columns; {remedy}") from None

    return AfterValidator(known)


_bits, _ = _worded({}, OF_BITS)
_input_bits, _input_bit_words = _worded({"none": FULL}, OF_INPUT_BITS)
_of_weights, _weight_words = _worded({"row": ROW, "tensor": TENSOR}, OF_WEIGHTS)
_of_inputs, _input_words = _worded({"token": ROW, "tensor": TENSOR}, OF_INPUTS)
_said = PlainSerializer(lambda model: model.model_dump(mode="json", exclude_unset=True))

MethodName = Annotated[str, BeforeValidator(_known_method)]
Bits = Annotated[int, _bits, AfterValidator(_known_bits)]
InputBits = Annotated[int, _input_bits, AfterValidator(_known_input_bits), _input_bit_words]
GroupSize = Annotated[int, _of_weights, _grouped(OF_WEIGHTS), _weight_words]
InputGroupSize = Annotated[int, _of_inputs, _grouped(OF_INPUTS), _input_words]


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
        if not isinstance(value, dict | Activations):
            raise ValueError(f"{value!r}; write none, or {{bits: 8, group_size: token}}")
        return {key: said for key, said in value.items() if said is not None} if isinstance(value, dict) else value

    @model_serializer(mode="wrap")
    def _to_word(self, dump: SerializerFunctionWrapHandler) -> Any:
        return "none" if self.bits == FULL and self.model_fields_set == {"bits"} else dump(self)

    @property
    def spelt_out(self) -> "Activations":
        """The same with its defaults said: per token and symmetric."""
        if self.bits == FULL:
            return self
        return Activations.model_validate({"group_size": ROW, "symmetric": True} | self.model_dump(exclude_unset=True))

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
    kind: RuleKind | None = None

    @model_validator(mode="after")
    def _selects_and_changes(self) -> "Rule":
        if not self.selectors:
            raise ValueError("a rule must say what it is for; give match, component, blocks or kind")
        if all(getattr(self, key) is None for key in Settings.model_fields):
            raise ValueError(f"a rule must change something; give one of {', '.join(Settings.model_fields)}")
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


# pydantic's name of a fault -> what to say of it; where several kinds of value would do, what each would take is listed
FAULTS = {
    "tuple_type": "not a list; write [...]",
    "dict_type": "no keys; write {key: value}",
    "model_type": "no keys; write {key: value}",
    "string_type": "no text; put it in quotes",
}
CHOICES = {
    "literal_error": "{expected}",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "float_type": "a number",
    "float_parsing": "a number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number from {ge:g} up",
    "less_than_equal": "a number up to {le:g}",
}
_PARTS_OF_TYPES = ("[key]", "constrained-float", "literal['search']")  # in pydantic's places; no person wrote them


def first_fault(error: ValidationError) -> tuple[str, str]:
    """Where the first fault is (keys joined by dots), and what it is with its remedy, in a person's words."""

    def place(details: Any) -> str:
        return ".".join(str(part) for part in details["loc"] if part not in _PARTS_OF_TYPES)

    first, *others = error.errors()
    where, kind = place(first), first["type"]
    if kind in ("extra_forbidden", "invalid_key"):
        remedy = "write it under components" if where in COMPONENTS else "docs/recipes.md lists them"
        return where, f"unknown key; {remedy}"
    if first["input"] is None:
        return where, "nothing is said; give it a value, or leave the key out"
    if kind not in CHOICES:
        return where, FAULTS.get(kind, first["msg"].removeprefix("Value error, "))
    here = [first, *(other for other in others if place(other) == where and other["type"] in CHOICES)]
    choices = [CHOICES[fault["type"]].format(**fault.get("ctx", {})) for fault in here]
    return where, f"{first['input']!r}; choose {' or '.join(choices)}"
