"""YAML that a person wrote: plain values, and no key said twice, of which YAML would take the last in silence."""

from pathlib import Path
from typing import Any

import yaml

from vlmq.exporter.errors import VlmqError


class _Loader(yaml.SafeLoader):
    """Sees keys as they are written, before `<<` merges other mappings into theirs."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if key.id == "scalar"):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise VlmqError(f"{self.name}: line {line}: {key.value}: said twice; keep one")
            seen.add(key.value)
        return node


def read_yaml(file: Path) -> Any:
    """The plain values of a YAML or JSON file; VlmqError naming it where it is neither."""
    try:
        with file.open(encoding="utf-8") as stream:
            return yaml.load(stream, _Loader)
    except OSError as error:
        raise VlmqError(f"{file}: cannot be read ({error.strerror}); name a recipe file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise VlmqError(f"{file}: not YAML ({str(error).splitlines()[0]}); see docs/recipes.md") from error
