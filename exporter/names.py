"""On-disk names of tensors to the names a transformers model has for them in memory.

The two differ: LLaVA on the Hub says `language_model.model.layers.0...` and `vision_tower.vision_model...` where
the model in memory says `model.language_model.layers.0...` and `model.vision_tower...`. transformers renames while
it loads; this applies the same tables by the same functions, so that there is nothing here to fall behind.
"""

from collections.abc import Callable, Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from vlmq.formats.layouts import PARTS


def memory_name(disk_name: str, model: PreTrainedModel) -> str:
    """The in-memory name of one tensor or module; for many names call `memory_names`, which reads the tables once."""
    return memory_names([disk_name], model)[disk_name]


def memory_names(disk_names: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Every on-disk name of a tensor (or of a module) with its in-memory name; `model` may be on the meta device.

    A packed weight's tensors (`weight_packed`, `qweight`, ...) are named as their `weight` would be. ValueError
    for a tensor that transformers splits or joins while loading: such a checkpoint cannot be streamed by name.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    known = model.state_dict()

    def renamed(name: str) -> str:
        target, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if converted is not None:
            raise ValueError(f"{name}: transformers converts this tensor while loading; save the model again with it")
        if target not in known and name in known:  # as transformers does: the name was right already
            return name
        return target

    # Sorted, because a rule may be switched on by the first name it meets.
    return {name: _through_weight(name, renamed) for name in sorted(disk_names)}


def _through_weight(name: str, renamed: Callable[[str], str]) -> str:
    """Rename with the last part of a packed weight's tensor replaced by the `weight` that transformers knows."""
    module, _, part = name.rpartition(".")
    if part in PARTS:
        return renamed(f"{module}.weight").removesuffix("weight") + part
    return renamed(name)
