"""What is compared: methods, bits, granularities and components, as recipes, in the order they are to be measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CHECKPOINTS = ("blip2-mini", "llava-mini")
VARIANTS = ("plain", "outliers")
SEEDS = (0, 1, 2)
FULL = 16

ROTATE = ["language", "vision"]
WEIGHT_ONLY: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform"},
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq"},
}
VARIED: dict[str, dict[str, Any]] = {  # all components only
    "gptaq": {"method": "gptq", "options": {"gptaq": True}},
    "awq+gptq": {"method": "awq+gptq"},
    "awq by block": {"method": "awq", "options": {"awq_loss": "block"}},
    "gptq weighted": {"method": "gptq", "options": {"token_weights": "modality"}},
}
VARIED_BITS = {"gptaq": (4, 3, 2), "awq+gptq": (4, 3, 2), "awq by block": (3,), "gptq weighted": (3,)}
WITH_INPUTS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "vanilla smoothquant": {"method": "smoothquant", "options": {"alpha": 0.5}},  # as its paper has it
    "smoothquant": {"method": "smoothquant"},  # alpha searched with what is rounded inside the loss
    "awq+smoothquant": {"method": "awq+smoothquant"},
    "smoothquant+gptq": {"method": "smoothquant+gptq"},
    "rotate+rtn": {"method": "rtn", "rotate": ROTATE},
    "rotate+gptq": {"method": "gptq", "rotate": ROTATE},
    "rotate+awq+gptq": {"method": "awq+gptq", "rotate": ROTATE},
    "rotate+smoothquant+gptq": {"method": "smoothquant+gptq", "rotate": ROTATE},
}
SEARCHED = {
    "layer-wise": {"cross_layer": False, "vision_tuning": False},
    "qvlm, CDM only": {"cross_layer": True, "vision_tuning": False},
    "qvlm, VEO only": {"cross_layer": False, "vision_tuning": True},
    "qvlm": {"cross_layer": True, "vision_tuning": True},
}
WITH_INPUTS |= {name: {"method": "qvlm", "options": options} for name, options in SEARCHED.items()}
# Q-VLM after the channels were evened out: paper 004 rounds the language model's inputs channel by channel.
WITH_INPUTS |= {
    f"smoothquant+{name}": {"method": "smoothquant+qvlm", "options": options} for name, options in SEARCHED.items()
}

# Name -> group_size of the weights, and of the inputs.
GRANULARITIES: dict[str, tuple[int | str, int | str]] = {
    "g64": (64, 64),
    "g128": (128, 128),
    "token": ("row", "token"),
    "tensor": ("tensor", "tensor"),
}
# What stays at 16 bits.
COMPONENTS = {"all": (), "language": ("vision", "connector"), "vision": ("connector", "language")}


@dataclass(frozen=True)
class Configuration:
    """A method at one budget; 16 bits are full precision."""

    method: str  # of WEIGHT_ONLY, or of WITH_INPUTS where inputs are rounded too; or `reference`
    weights: int = FULL
    inputs: int = FULL
    granularity: str = "-"
    components: str = "-"

    def __str__(self) -> str:
        return f"{self.method} W{self.weights}A{self.inputs} {self.granularity} {self.components}"

    @property
    def recipe(self) -> dict[str, Any]:
        methods = WEIGHT_ONLY | VARIED if self.inputs == FULL else WITH_INPUTS
        weights, inputs = GRANULARITIES[self.granularity]
        found = {**methods[self.method], "bits": self.weights, "group_size": weights}
        if self.method == "uniform":
            found["symmetric"] = False
        if self.inputs != FULL:
            found["activations"] = {"bits": self.inputs, "group_size": inputs}
        if "rotate" in found and self.components != "all":
            found["rotate"] = [self.components]
        if COMPONENTS[self.components]:
            found["components"] = {component: {"bits": FULL} for component in COMPONENTS[self.components]}
        return found

    @property
    def looks(self) -> bool:
        """Whether it depends on the calibration samples, or on any other seed."""
        static = self.inputs != FULL and self.granularity == "tensor"
        return static or self.method not in ("reference", "uniform", "rtn")


REFERENCE = Configuration("reference")


@dataclass(frozen=True)
class Row:
    """One measurement: a configuration on a checkpoint; the seed draws the calibration samples, and the outliers."""

    checkpoint: str
    variant: str
    seed: int
    configuration: Configuration

    def __str__(self) -> str:
        return f"{self.checkpoint} {self.variant} {self.seed} {self.configuration}"


def once(variant: str, configuration: Configuration) -> bool:
    """Whether all seeds would give the same, so that one is measured."""
    return variant == "plain" and not configuration.looks


def rows() -> list[Row]:
    """Every row, the most telling first; of those a seed after the other, so that an early end leaves whole tables."""
    ordered = (
        Row(checkpoint, variant, seed, configuration)
        for stage in (_claimed, _components, _rounded, _searched)
        for seed in SEEDS
        for checkpoint in CHECKPOINTS
        for variant in VARIANTS
        for configuration in stage(variant)
        if seed == SEEDS[0] or not once(variant, configuration)
    )
    return list(dict.fromkeys(ordered))


def _claimed(variant: str) -> Iterator[Configuration]:
    """What the sentences of verdicts.py are about: all components."""
    yield REFERENCE
    yield from _weight_only("all")
    yield from (Configuration(method, 4, FULL, "g128", "all") for method in ("rtn", "awq", "gptq", "awq+gptq"))
    for method, bits in VARIED_BITS.items():
        yield from (Configuration(method, each, FULL, "g64", "all") for each in bits)
    for method in ("rtn", "smoothquant", "awq+smoothquant"):
        yield from (Configuration(method, 4, 4, granularity, "all") for granularity in ("g64", "token", "tensor"))
        yield Configuration(method, 8, 8, "tensor", "all")
    rotated = ("rotate+rtn", "rotate+gptq", "rotate+awq+gptq", "rotate+smoothquant+gptq")
    for method in ("vanilla smoothquant", "smoothquant+gptq", *rotated):
        yield Configuration(method, 4, 4, "g64", "all")
    # Outliers leave nothing of a model whose inputs have 4 bits and are not smoothed.
    searched = [("", "token"), ("", "tensor")] if variant == "plain" else [("smoothquant+", "token")]
    for before, granularity in searched:
        yield from (Configuration(f"{before}{name}", 4, 4, granularity, "all") for name in SEARCHED)


def _components(variant: str) -> Iterator[Configuration]:
    for components in ("language", "vision"):
        yield from _weight_only(components)


def _rounded(variant: str) -> Iterator[Configuration]:
    """What is left of methods x bits x components: inputs rounded too."""
    yield from _with_inputs("smoothquant", "awq+smoothquant", "rotate+gptq")


def _searched(variant: str) -> Iterator[Configuration]:
    """The same of the method that takes longest."""
    yield from _with_inputs("qvlm")


def _with_inputs(*methods: str) -> Iterator[Configuration]:
    for components in COMPONENTS:
        for method in methods:
            yield from (
                Configuration(method, weights, inputs, "g64", components)
                for weights, inputs in ((8, 8), (4, 4), (3, 8), (2, 8))
            )


def _weight_only(components: str) -> Iterator[Configuration]:
    for method in WEIGHT_ONLY:
        granularity = "tensor" if method == "uniform" else "g64"
        yield from (Configuration(method, bits, FULL, granularity, components) for bits in (4, 3, 2, 8))
