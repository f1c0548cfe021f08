"""Recipes in the two JSON layouts of mmq, the code of paper 002 ("Towards Understanding Quantization of VLMs").

A list (its uniform quantization), one entry for each part of BLIP-2 that is quantized:

    [{"model_part": "VIT", "layer_group": "FIRST", "layer_type": "MLP", "num_bits": 4}, ...]

and an object by component: bits for each kind of linear (AWQ), or settings for all of its linears (GPTQ):

    {"vit_layers": {"self_attn": 4, "self_attn_output": 4, "fc1": 4, "fc2": 4}, "qformer_layers": {...}, ...}
    {"vision": {"bits": 4, "group_size": -1, "percent_dampening": 0.01, ...}, "qformer": {...}, "language": {...}}

What a file does not name stays at 16 bits. docs/recipes.md says where that code did not do what its files say.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.settings import Rule, first_fault

Content = dict[str, Any]

# layout's word -> the selectors of a rule
PARTS: dict[str, Content] = {
    "VIT": {"component": "vision"},
    "QFORMER": {"match": r"^qformer\."},
    "LLM": {"component": "language"},
}
GROUPS: dict[str, Content] = {
    "FIRST": {"blocks": "front"},
    "MIDDLE": {"blocks": "middle"},
    "LAST": {"blocks": "end"},
    "ALL": {},
}
TYPES: dict[str, Content] = {"MLP": {"kind": "feedforward"}, "ATTENTION": {"kind": "attention"}, "BOTH": {}}
WORDS = {"model_part": PARTS, "layer_group": GROUPS, "layer_type": TYPES}

# layout's layers -> kind of linear -> a regular expression on the in-memory name
LAYERS: dict[str, dict[str, str]] = {
    "vit_layers": {
        "self_attn": r"^vision_model\..*\.self_attn\.qkv$",
        "self_attn_output": r"^vision_model\..*\.self_attn\.projection$",
        "fc1": r"^vision_model\..*\.mlp\.fc1$",
        "fc2": r"^vision_model\..*\.mlp\.fc2$",
    },
    "vision_layers": {  # LLaVA's
        "self_attn": r"vision_tower\..*\.self_attn\.(q|k|v|out)_proj$",
        "mlp": r"vision_tower\..*\.mlp\.fc[12]$",
    },
    "qformer_layers": {
        "self_attn": r"^qformer\..*\.attention\.attention\.(query|key|value)$",
        "self_attn_output": r"^qformer\..*\.attention\.output\.dense$",
        "cross_attn": r"^qformer\..*\.crossattention\.attention\.(query|key|value)$",
        "cross_attn_output": r"^qformer\..*\.crossattention\.output\.dense$",
        "intermediate_query": r"^qformer\..*\.intermediate_query\.dense$",
        "output_query": r"^qformer\..*\.output_query\.dense$",
        "intermediate_txt": r"^qformer\..*\.intermediate\.dense$",  # only models for retrieval have text in it
        "output_txt": r"^qformer\..*\.\d+\.output\.dense$",
    },
    "llm_layers": {
        "self_attn": r"language_model\..*\.self_attn\.[qkvo]_proj$",  # OPT's output is out_proj, on its own below
        "self_attn_output": r"language_model\..*\.self_attn\.out_proj$",
        "fc1": r"language_model\..*\.fc1$",
        "fc2": r"language_model\..*\.fc2$",
        "mlp": r"language_model\..*\.mlp\.(gate|up|down)_proj$",
    },
}

# layout's component -> the selectors of a rule; there, the projection belongs to the language model
COMPONENTS: dict[str, Content] = {
    "vision": {"component": "vision"},
    "qformer": {"match": r"^qformer\."},
    "language": {"match": r"^(model\.)?language_(model|projection)(\.|$)"},
}
SETTINGS = {"bits": "bits", "group_size": "group_size", "use_symmetric": "symmetric"}
OPTIONS = {"percent_dampening": "damp", "use_act_order": "act_order", "use_static_groups": "static_groups"}

NAMES = {ours: name for name, ours in SETTINGS.items()} | {f"options.{ours}": name for name, ours in OPTIONS.items()}


def is_layout(content: object) -> bool:
    """Is it one of the layouts (so far as one can tell from its outermost keys)?"""
    return isinstance(content, list) or (
        isinstance(content, dict) and bool(content) and (set(content) <= set(LAYERS) or set(content) <= set(COMPONENTS))
    )


def recipe(content: Any, where: str) -> Content:
    """The content of a recipe that says what the file says; VlmqError naming the file (`where`) and the wrong entry."""
    if isinstance(content, list):
        return {"method": "uniform", "bits": 16, "rules": list(_uniform(content, where))}
    if set(content) <= set(LAYERS):
        made = {"method": "awq", "bits": 16, "group_size": 128, "symmetric": False}
        return {**made, "rules": list(_awq(content, where))}
    return {"method": "gptq", "bits": 16, "rules": list(_gptq(content, where))}


def _uniform(entries: list[Any], where: str) -> Iterator[Content]:
    for number, entry in enumerate(entries):
        place = f"{where}: entry {number}"
        _check_keys(entry, (*WORDS, "num_bits"), place)
        rule: Content = {"bits": _value(entry, "num_bits", place)}
        for key, words in WORDS.items():
            word = str(_value(entry, key, place))
            if word not in words:
                raise VlmqError(f"{place}: {key} {word!r}; choose {', '.join(words)}")
            rule |= words[word]
        yield _checked(rule, place, {"bits": "num_bits"})


def _awq(content: Mapping[str, Any], where: str) -> Iterator[Content]:
    for layers, bits_of in content.items():
        place = f"{where}: {layers}"
        _check_keys(bits_of, tuple(LAYERS[layers]), place)
        for kind in bits_of:
            rule = {"match": LAYERS[layers][kind], "bits": _value(bits_of, kind, place)}
            yield _checked(rule, place, {"bits": kind})


def _gptq(content: Mapping[str, Any], where: str) -> Iterator[Content]:
    for component, said in content.items():
        place = f"{where}: {component}"
        _check_keys(said, (*SETTINGS, *OPTIONS), place)
        _value(said, "bits", place)
        settings = {ours: said[key] for key, ours in SETTINGS.items() if key in said}
        options = {ours: said[key] for key, ours in OPTIONS.items() if key in said}
        rule = {**COMPONENTS[component], **settings, **({"options": options} if options else {})}
        yield _checked(rule, place, NAMES)


def _checked(rule: Content, place: str, names: Mapping[str, str]) -> Content:
    """The rule, or VlmqError for a value it cannot have, under the name (of ours) that the file has for it."""
    try:
        Rule.model_validate(rule)
    except ValidationError as error:
        key, what = first_fault(error)
        raise VlmqError(f"{place}: {names[key]}: {what}") from error
    return rule


def _check_keys(entry: Any, keys: tuple[str, ...], place: str) -> None:
    if not isinstance(entry, dict):
        raise VlmqError(f"{place}: {entry!r} is no object; give one with the keys {', '.join(keys)}")
    for key in entry:
        if key not in keys:
            raise VlmqError(f"{place}: unknown key {key!r}; choose {', '.join(keys)}")


def _value(entry: Mapping[str, Any], key: str, place: str) -> Any:
    if entry.get(key) is None:
        raise VlmqError(f"{place}: {key} is missing; add it")
    return entry[key]
