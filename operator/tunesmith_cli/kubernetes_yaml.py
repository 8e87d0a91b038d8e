"""YAML as Kubernetes reads it. PyYAML alone takes 2e-4 for text, a date for a date, and the last of two equal keys.

`manifest` reads files and overrides with it; tests and scripts read samples with it.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["parsed"]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way
        first: [rule for rule in rules if not rule[0].endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_NUMBER = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


def parsed(text: str) -> list[Any]:
    """The documents of a text, in order; an empty one is None.

    Raises:
        yaml.YAMLError: it is no YAML, or a key is there twice.
    """
    return list(yaml.load_all(text, Loader=_Loader))
