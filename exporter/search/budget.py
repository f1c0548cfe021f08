"""A budget as a person says it: bits per weight, a share of the checkpoint, or bytes of all weights."""

import math
import re

from vlmq.exporter.errors import VlmqError

REMEDY = "write one like 3.8bpw, 40% or 2GiB"


def in_bytes(text: str, weights: int, linears: int, elsewhere: int) -> int:
    """How many bytes the linears may have. VlmqError where it is no budget.

    weights: bytes of the checkpoint; linears: how many weights the blocks' linears have; elsewhere: bytes of all else.
    `bpw` counts codes, scales and zeros of those linears, and those that are left alone among them; `%` and bytes
    count everything.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    said = re.fullmatch(r"\s*([0-9.]+)\s*(bpw|%)\s*", text)
    try:
        if not said:
            return int(TypeAdapter(ByteSize).validate_python(text)) - elsewhere
        value = float(said[1])
    except (ValidationError, ValueError):
        raise VlmqError(f"--budget {text}: not a budget; {REMEDY}") from None
    if not (math.isfinite(value) and value > 0):
        raise VlmqError(f"--budget {text}: nothing fits in it; {REMEDY}")
    if said[2] == "bpw":
        return math.floor(value * linears / 8)
    return math.floor(value / 100 * weights) - elsewhere
