"""The flags that make up a recipe: one list of them, for every command that takes a recipe."""

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlmq.exporter.errors import VlmqError

if TYPE_CHECKING:
    from vlmq.exporter.recipe import Recipe


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags that make up a recipe; it gets the effective one as `recipe`."""

    def flags(
        recipe: Annotated[
            Path | None, typer.Option(help="A recipe file (YAML); flags override it. See docs/recipes.md.")
        ] = None,
        method: Annotated[
            str | None,
            typer.Option(
                help="uniform, rtn, awq, gptq, smoothquant, qvlm, awq+smoothquant, awq+gptq, smoothquant+gptq, "
                "awq+smoothquant+gptq or smoothquant+qvlm.  \\[default: awq]"
            ),
        ] = None,
        bits: Annotated[int | None, typer.Option(help="2, 3, 4, 5, 6, 8; 16 leaves alone.  \\[default: 4]")] = None,
        group_size: Annotated[
            str | None, typer.Option(help="Columns that share a scale, 16 to 256, or row, or tensor.  \\[default: 128]")
        ] = None,
        symmetric: Annotated[
            bool | None,
            typer.Option("--symmetric/--asymmetric", help="Is zero the grid's middle?  \\[default: symmetric]"),
        ] = None,
        activation_bits: Annotated[
            str | None, typer.Option(help="Bits that inputs are rounded to: 4, 6, 8 or none.  \\[default: none]")
        ] = None,
        activation_group: Annotated[
            str | None,
            typer.Option(help="What of an input shares a scale: token, tensor, or columns.  \\[default: token]"),
        ] = None,
        option: Annotated[
            list[str] | None, typer.Option(help="KEY=VALUE of a method, such as damp=0.05; may be repeated.")
        ] = None,
        indivisible: Annotated[
            str | None,
            typer.Option(help="Columns that groups do not divide: refuse, or shrink the group.  \\[default: refuse]"),
        ] = None,
        qkv: Annotated[
            str | None, typer.Option(help="Fused projections: fused, split, v-only or skip.  \\[default: fused]")
        ] = None,
        rotate: Annotated[
            list[str] | None, typer.Option(help="Rotate a residual stream: language or vision; may be repeated.")
        ] = None,
        vision_bits: Annotated[int | None, typer.Option(help="Bits of the vision encoder.")] = None,
        connector_bits: Annotated[int | None, typer.Option(help="Bits of the Q-Former or projector.")] = None,
        language_bits: Annotated[int | None, typer.Option(help="Bits of the language model.")] = None,
        vision_method: Annotated[str | None, typer.Option(help="Method of the vision encoder.")] = None,
        connector_method: Annotated[str | None, typer.Option(help="Method of the Q-Former or projector.")] = None,
        language_method: Annotated[str | None, typer.Option(help="Method of the language model.")] = None,
        consumer: Annotated[
            Literal["any", "transformers", "vllm", "onnxruntime"] | None,
            typer.Option(help="Who is to load it; what that cannot take quantized is left alone.  \\[default: any]"),
        ] = None,
        **others: Any,
    ) -> None:
        made = recipe_of(
            recipe,
            {
                "method": method,
                "bits": bits,
                "group_size": group_size,
                "symmetric": symmetric,
                "activations": _activations(activation_bits, activation_group),
                "options": _options(option or []),
                "indivisible": indivisible,
                "qkv": qkv,
                "rotate": rotate or None,
                "consumer": consumer,
                "components": {
                    "vision": {"bits": vision_bits, "method": vision_method},
                    "connector": {"bits": connector_bits, "method": connector_method},
                    "language": {"bits": language_bits, "method": language_method},
                },
            },
        )
        command(recipe=made, **others)

    # typer reads signatures: the command's own parameters, with `recipe` replaced by the flags.
    own = [
        parameter for parameter in signature(command, eval_str=True).parameters.values() if parameter.name != "recipe"
    ]
    shared = [parameter for parameter in signature(flags).parameters.values() if parameter.name != "others"]
    parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in (*own[:2], *shared, *own[2:])]
    flags.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    flags.__name__, flags.__doc__ = command.__name__, command.__doc__
    return flags


def recipe_of(file: Path | None, flags: dict[str, Any]) -> "Recipe":
    """Flags laid over the recipe file, if there is one."""
    from vlmq.exporter.recipe import make_recipe, read_recipe

    content = read_recipe(file).model_dump(mode="json", exclude_unset=True) if file else {}
    return make_recipe(_laid_over(content, flags))


def _laid_over(content: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """`content` with every flag that was given in its place, dictionaries key by key."""
    made = dict(content)
    for key, value in flags.items():
        if isinstance(value, dict):
            below = made.get(key)
            value = _laid_over(below if isinstance(below, dict) else {}, value) or None
        if value is not None:
            made[key] = value
    return made


def _activations(bits: str | None, group: str | None) -> str | dict[str, Any]:
    if bits != "none":
        return {"bits": bits, "group_size": group}
    if group is not None:
        raise VlmqError(f"--activation-group {group}: --activation-bits none rounds no inputs; leave one of them out")
    return bits


def _options(given: list[str]) -> dict[str, Any]:
    """KEY=VALUE flags as a dictionary, values read as YAML reads them."""
    import yaml

    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise VlmqError(f"--option {text}: no value; write KEY=VALUE, such as damp=0.05")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise VlmqError(f"--option {text}: not a YAML value; write KEY=VALUE, such as damp=0.05") from error
        if options[key] is None:
            raise VlmqError(f"--option {text}: no value; write KEY=VALUE, or take {key} out of the recipe file")
    return options
