"""JSON that a person wrote or fetched, checked against what it should be, with one line for what is wrong."""

from pathlib import Path
from typing import TypeVar

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
        first = fault.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise VlmqError(f"{where}: {f'{place}: ' if place else ''}{first['msg']}; {remedy}") from None
