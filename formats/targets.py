"""Which linears a config means: few targets, or few prefixes, for many names, and how readers match them."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from vlmq.formats.errors import FormatError


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


def prefixes(names: Iterable[str], others: Iterable[str], aliases: Mapping[str, Iterable[str]]) -> list[str]:
    """Few prefixes, each of whole parts of a name, that cover all of `names` and none of `others`, by any name of each.

    aliases: the other names that a linear goes by. A prefix does not even occur inside a name of `others`, because
    readers of AWQ look for it there: `layers.1` would mean `layers.10` too. FormatError where a whole name does.
    """

    def all_names(linears: Iterable[str]) -> list[str]:
        return [alias for linear in linears for alias in (linear, *aliases.get(linear, ()))]

    foreign = all_names(others)
    text = "\n".join(foreign)
    found = set()
    for name in all_names(names):
        parts = name.split(".")
        tried = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        prefix = next((prefix for prefix in tried if prefix not in text), None)
        if prefix is None:
            inside = next(other for other in foreign if name in other)
            raise FormatError(
                f"{name}: readers would take {inside} for it; give both one grid, or choose compressed-tensors"
            )
        found.add(prefix)
    return sorted(found)
