"""JSON schemas that an answer is bound to: what a grammar can't hold to is refused, never dropped.

llama.cpp makes a grammar of a schema and passes over keywords that it doesn't know: the answer would be free where its
reader thinks that it is bound. Called by `chat`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tunesmith_server.front.errors import ApiError

__all__ = ["check_schema"]

NOTES = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "example",
        "$schema",
        "$id",
        "$comment",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$defs",
        "definitions",
    ]
)
"""Say nothing about what is valid."""
BY_TYPE = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"pattern", "format", "minLength", "maxLength"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset[str](),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
FORMATS = ("date", "time", "date-time", "uuid")
COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
REFERENCE = re.compile(r"#/(?:\$defs|definitions)/([^/~%]+)")
BEYOND_PATTERN = re.compile(r"\(\?(?!:)|\\[bBAZzkpPGKXRux\d]")
MAX_DEPTH = 24
MAX_NODES = 1000
MAX_BYTES = 64 << 10
MAX_COUNT = 1000
MAX_PATTERN = 256


def check_schema(schema: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the schema in the form that grammars are made of.

    Raises:
        ApiError: it asks for what a grammar can't express.
    """
    if len(json.dumps(schema)) > MAX_BYTES:
        raise _refused(where, f"it has more than {MAX_BYTES} bytes")
    return _Check(schema, where).run()


def _refused(where: str, why: str) -> ApiError:
    return ApiError(400, f"The schema at '{where}' can't be enforced: {why}", param=where, code="unsupported_schema")


class _Check:
    """One schema on its way through the rules."""

    def __init__(self, root: Mapping[str, Any], where: str) -> None:
        self._root = root
        self._where = where
        self._nodes = 0

    def run(self) -> dict[str, Any]:
        """The root, and all that it may refer to."""
        done = self._node(self._root, self._where, 0)
        for section in ("$defs", "definitions"):
            if (parts := self._root.get(section)) is not None:
                done[section] = self._named(parts, f"{self._where}.{section}", 1)
        return done

    def _named(self, parts: Any, where: str, depth: int) -> dict[str, Any]:
        if not isinstance(parts, dict):
            raise _refused(where, "it must be an object")
        return {name: self._node(part, f"{where}.{name}", depth) for name, part in parts.items()}

    def _listed(self, parts: Any, where: str, depth: int) -> list[Any]:
        if not isinstance(parts, list) or not parts:
            raise _refused(where, "it must be an array that is not empty")
        return [self._node(part, f"{where}[{number}]", depth) for number, part in enumerate(parts)]

    def _node(self, node: Any, where: str, depth: int) -> dict[str, Any]:
        self._nodes += 1
        if not isinstance(node, dict):
            raise _refused(where, "it must be an object")
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise _refused(where, f"it is deeper than {MAX_DEPTH} or has more than {MAX_NODES} parts")
        rules = {name: value for name, value in node.items() if name not in NOTES and value is not None}
        only = rules.get("allOf")
        if isinstance(only, list) and len(only) == 1 and len(rules) == 1:
            return self._node(only[0], f"{where}.allOf[0]", depth + 1)
        for name in ("$ref", "anyOf", "oneOf"):
            if name in rules:
                return self._alone(name, rules, where, depth)
        if "enum" in rules or "const" in rules:
            return self._values(rules, where)
        return self._typed(rules, where, depth)

    def _alone(self, name: str, rules: dict[str, Any], where: str, depth: int) -> dict[str, Any]:
        """A keyword beside which grammars pass over all others."""
        if len(rules) > 1:
            others = ", ".join(sorted(rules.keys() - {name}))
            raise _refused(where, f"{name} can't stand beside {others}")
        if name == "$ref":
            found = REFERENCE.fullmatch(str(rules["$ref"]))
            sections = (self._root.get("$defs"), self._root.get("definitions"))
            if found is None or not any(isinstance(it, dict) and found[1] in it for it in sections):
                raise _refused(where, f"there is no {rules['$ref']}: $ref must lead to an entry of $defs")
            return dict(rules)
        return {name: self._listed(rules[name], f"{where}.{name}", depth + 1)}

    def _values(self, rules: dict[str, Any], where: str) -> dict[str, Any]:
        if others := sorted(rules.keys() - {"enum", "const", "type"}):
            raise _refused(where, f"enum and const can't stand beside {', '.join(others)}")
        if "enum" in rules and (not isinstance(rules["enum"], list) or not rules["enum"]):
            raise _refused(where, "enum must be an array that is not empty")
        if "enum" in rules and "const" in rules:
            raise _refused(where, "enum and const can't stand together")
        kept = "enum" if "enum" in rules else "const"
        return {kept: rules[kept]}

    def _typed(self, rules: dict[str, Any], where: str, depth: int) -> dict[str, Any]:
        types = _types(rules, where)
        if len(types) > 1:
            # several types: each gets the keywords that are about it
            parts = [{"type": it} | {name: rules[name] for name in BY_TYPE[it] if name in rules} for it in types]
            self._beyond(rules, types, where)
            return {"anyOf": [self._typed(part, where, depth) for part in parts]}
        self._beyond(rules, types, where)
        _counts(rules, where)
        done = dict(rules)
        if "properties" in rules:
            done["properties"] = self._named(rules["properties"], f"{where}.properties", depth + 1)
        if isinstance(rules.get("additionalProperties"), dict):
            done["additionalProperties"] = self._node(rules["additionalProperties"], where, depth + 1)
        if isinstance(rules.get("items"), dict):
            done["items"] = self._node(rules["items"], f"{where}.items", depth + 1)
        if "prefixItems" in rules:
            if "items" in rules or "minItems" in rules or "maxItems" in rules:
                raise _refused(where, "prefixItems can't stand beside items, minItems or maxItems")
            done["prefixItems"] = self._listed(rules["prefixItems"], f"{where}.prefixItems", depth + 1)
        _string(rules, where)
        _object(rules, where)
        return done

    def _beyond(self, rules: dict[str, Any], types: list[str], where: str) -> None:
        known = {"type"}.union(*(BY_TYPE[it] for it in types))
        if beyond := sorted(rules.keys() - known):
            about = f" of {' or '.join(types)}" if types else " without a type"
            raise _refused(where, f"{', '.join(beyond)}{about} is beyond the grammar")


def _types(rules: dict[str, Any], where: str) -> list[str]:
    value = rules.get("type")
    if value is None:
        # as converters guess it
        found = [kind for kind in ("object", "array", "string", "integer") if BY_TYPE[kind] & rules.keys()]
        if len(found) > 1:
            raise _refused(where, "it needs a type")
        return found
    types = [value] if isinstance(value, str) else value
    if not isinstance(types, list) or not types or not all(isinstance(it, str) and it in BY_TYPE for it in types):
        raise _refused(where, f"type must be one of {', '.join(BY_TYPE)}")
    return types


def _counts(rules: dict[str, Any], where: str) -> None:
    for name in COUNTS:
        value = rules.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
            raise _refused(where, f"{name} must be a whole number from 0 to {MAX_COUNT}")
    for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        value = rules.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > 2**53:
            raise _refused(where, f"{name} must be a whole number")


def _string(rules: dict[str, Any], where: str) -> None:
    pattern, form = rules.get("pattern"), rules.get("format")
    bounded = "minLength" in rules or "maxLength" in rules
    if sum((pattern is not None, form is not None, bounded)) > 1:
        raise _refused(where, "pattern, format and a length can't stand together")
    if form is not None and form not in FORMATS:
        raise _refused(where, f"format must be one of {', '.join(FORMATS)}")
    if pattern is None:
        return
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN or not re.fullmatch(r"\^.*\$", pattern, re.DOTALL):
        raise _refused(where, f"pattern must begin with ^ and end with $, in {MAX_PATTERN} characters at most")
    try:
        re.compile(pattern)
    except (re.error, RecursionError) as error:
        raise _refused(where, f"pattern is no regular expression: {error}") from error
    if BEYOND_PATTERN.search(pattern):
        raise _refused(
            where, "pattern may have no look-around, flags, back references or classes beyond \\d, \\w and \\s"
        )


def _object(rules: dict[str, Any], where: str) -> None:
    required, properties = rules.get("required", []), rules.get("properties", {})
    if not isinstance(required, list) or not all(isinstance(it, str) for it in required):
        raise _refused(where, "required must be an array of names")
    if unknown := [it for it in required if it not in properties]:
        raise _refused(where, f"required names {', '.join(unknown)}, which is none of its properties")
    if not isinstance(rules.get("additionalProperties", False), bool | dict):
        raise _refused(where, "additionalProperties must be true, false or a schema")
