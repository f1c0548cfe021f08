"""Where the shipped demo checkpoints are, by name."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "checkpoints"

CHECKPOINTS: dict[str, Path] = {name: _FOLDER / name for name in ("blip2-mini", "llava-mini")}
