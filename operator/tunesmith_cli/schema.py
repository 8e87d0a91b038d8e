"""The API types' schema, walked beside a document: what the API server does with the CRD, without an API server.

`refusals` finds with it the rules that pydantic doesn't know: CEL, unwanted nulls, repeated entries of a set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

__all__ = ["Part", "document_schema", "node_at", "parts", "path_of"]

JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A value of a document, its path, and the schema node that describes it."""

    path: tuple[str | int, ...]
    value: Any
    node: JSON


def path_of(parts: Sequence[str | int]) -> str:
    """A path as the API server writes it: `spec.dataset.train`, `spec.tolerations[0].key`."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


@cache
def document_schema(kind: type[BaseModel]) -> JSON:
    """The JSON Schema of a kind, references included."""
    return kind.model_json_schema(by_alias=True)


def _resolved(node: JSON, root: JSON) -> JSON:
    """Follow references and look through `| None`; what stands beside a reference is added to it."""
    while "$ref" in node or "anyOf" in node:
        beside = {key: value for key, value in node.items() if key not in ("$ref", "anyOf")}
        if "$ref" in node:
            target = root["$defs"][node["$ref"].rsplit("/", 1)[1]]
        else:
            target = next(choice for choice in node["anyOf"] if choice.get("type") != "null")
        rules = [*target.get("x-kubernetes-validations", ()), *beside.get("x-kubernetes-validations", ())]
        node = {**target, **beside}
        if rules:
            node["x-kubernetes-validations"] = rules
    return node


def _child(node: JSON, key: str | int) -> JSON | None:
    if isinstance(key, int):
        return node.get("items")
    child = node.get("properties", {}).get(key)
    more = node.get("additionalProperties")
    return child if child is not None else more if isinstance(more, dict) else None


def parts(document: Any, schema: JSON) -> Iterator[Part]:
    """Every described value of a document, from the outside in."""
    return _parts((), document, schema, schema)


def _parts(path: tuple[str | int, ...], value: Any, node: JSON, root: JSON) -> Iterator[Part]:
    node = _resolved(node, root)
    yield Part(path, value, node)
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        child = _child(node, key)
        if child is not None:
            yield from _parts((*path, key), inner, child, root)


def node_at(schema: JSON, path: Sequence[str | int]) -> JSON:
    """The node that describes the value at a path; empty where there is none."""
    node = _resolved(schema, schema)
    for key in path:
        child = _child(node, key)
        if child is None:
            return {}
        node = _resolved(child, schema)
    return node
