"""JSON that a person wrote or fetched, checked against what it should be, with one line for what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vlmq.exporter.errors import VlmqError

Content = TypeVar("Content", bound=BaseModel)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise VlmqError(f"{path}: not UTF-8 text; check the file") from None
    except OSError as fault:
        raise VlmqError(f"{path}: {fault.strerror}; check the path") from None


def parse(text: str, kind: type[Content], where: object, remedy: str) -> Content:
    """The text as a `kind`; VlmqError with the place of the first thing that is not as it should be."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as fault:
        raise VlmqError(f"{where}: {first_fault(fault)}; {remedy}") from None


def first_fault(error: ValidationError) -> str:
    """Where and what the first thing is that is not as it should be."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def parse_keyed(
    text: str, kind: type[Content], where: object, remedy: str, fault: Callable[[str, str], None]
) -> Content:
    """As `parse`, for a file whose outermost keys are ids; `fault` gets every id that occurs again, and a line.

    JSON readers keep the last of equal keys in silence; here the first is kept.
    """

    def first_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key, value in pairs:
            if key not in kept:
                kept[key] = value
            elif isinstance(value, dict):  # a sample, not a field of one
                fault(f"{key}#2", f"{where}: id {key} occurs more than once; give every sample an id of its own")
        return kept

    try:
        return kind.model_validate(json.loads(text, object_pairs_hook=first_of_each))
    except json.JSONDecodeError as error:
        raise VlmqError(f"{where}: not JSON (line {error.lineno}: {error.msg}); {remedy}") from None
    except ValidationError as error:
        raise VlmqError(f"{where}: {first_fault(error)}; {remedy}") from None
