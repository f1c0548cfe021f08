"""Flags a person typed, as the values they stand for."""

from vlmq.exporter.errors import VlmqError


def group_of(text: str) -> int:
    """32, row, tensor: a group size as recipes have it."""
    from vlmq.exporter.recipe import make_recipe

    return make_recipe({"group_size": text.strip()}, "--groups").group_size


def thresholds_of(given: list[str] | None, max_drop: float | None) -> dict[str, float]:
    """NAME=VALUE flags, and --max-drop, which is one of them."""
    found = {} if max_drop is None else {"max-drop": max_drop}
    for text in given or []:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise VlmqError(f"--threshold {text}: no number; write NAME=VALUE, such as kl=0.05") from None
    return found


def bytes_of(size: str, flag: str) -> int:
    """5GB, 512MiB, 1000000: a size in bytes."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        raise VlmqError(f"{flag} {size}: not a size; write one like 512MiB or 5GB") from None
