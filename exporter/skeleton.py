"""A model without its weights: parameters on the meta device, buffers with their values.

A model built wholly on the meta device loses the buffers that no file holds (rotary frequencies, position ids), so
only the parameters are moved there, each as it is registered; none is ever filled.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel


def skeleton(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that `config` describes, in eval mode, every parameter on the meta device and of `dtype`."""
    with _parameters_on_meta():
        # A copy, because transformers notes `dtype` in the configuration, which says what the weights are stored in.
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=dtype)
    # transformers draws this line for fp16 only: layers that overflow in it (BLIP-2's Q-Former) stay in float32.
    if dtype == torch.float16:
        _keep_in_float32(model, model._keep_in_fp32_modules or ())
    return model.eval()


def untie(model: PreTrainedModel, weight: str) -> None:
    """Make a weight that is tied to another one of its own, still on the meta device."""
    if weight in model.all_tied_weights_keys:
        del model.all_tied_weights_keys[weight]
        path, _, leaf = weight.rpartition(".")
        parameter = model.get_parameter(weight)
        setattr(model.get_submodule(path), leaf, nn.Parameter(parameter.detach(), requires_grad=False))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        # One already there is returned as it is, or two tied names would become two parameters.
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]    # torch says "-> None"
    try:
        yield
    finally:
        hook.remove()


def _keep_in_float32(model: PreTrainedModel, parts: Iterable[str]) -> None:
    """Every parameter with one of `parts` in its name becomes float32 (still on the meta device)."""
    for name, parameter in model.named_parameters():
        if set(parts) & set(name.split(".")):
            parameter.data = parameter.data.float()
