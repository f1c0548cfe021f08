"""Which linears a config group of compressed-tensors means: few targets for many names, and how readers match them."""

import re
from collections import defaultdict
from collections.abc import Iterable


def patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Few targets that match all of `names` and none of `others`: regexes, anchored at both ends.

    Names that differ in their layer numbers alone become one regex, unless it would match one of `others`; then
    their layers are listed in it. A name without a number stays as it is.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[_NUMBER.sub("#", name)].append(name)
    foreign = {_NUMBER.sub("#", name) for name in others}
    targets = []
    for shape, members in sorted(alike.items()):
        if "#" not in shape:
            targets.append(shape)
        elif shape not in foreign:
            targets.append(_regex(shape, r"\d+"))
        elif shape.count("#") == 1:
            layers = sorted((number for name in members for number in _NUMBER.findall(name)), key=int)
            targets.append(_regex(shape, f"({'|'.join(layers)})"))
        else:
            targets.extend(sorted(members))
    return targets


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _regex(shape: str, numbers: str) -> str:
    return "re:^" + re.escape(shape).replace(r"\#", numbers) + "$"


def matches(target: str, name: str) -> bool:
    """As compressed-tensors matches: `re:` and a pattern, or the whole name (its class names are not used here)."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name
