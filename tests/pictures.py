"""Pictures and prompts to ask any tiny model about, without importing PyTorch."""

import numpy as np
from PIL import Image

# Of different lengths, so that all but the longest are padded.
QUESTIONS = ("Question: what is the colour of the circle? Answer:", "a photo", "Question: how many? Answer:")


def pictures() -> list[Image.Image]:
    """One picture for each question, neither square nor of the model's size."""
    source = np.random.default_rng(0)
    return [Image.fromarray(source.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in QUESTIONS]


def prompts(variant: str) -> list[str]:
    before = "" if variant.startswith("blip2") else "USER: <image>\n"
    return [before + question for question in QUESTIONS]
