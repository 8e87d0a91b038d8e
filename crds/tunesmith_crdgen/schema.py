"""Rewrites pydantic's JSON Schema into the structural OpenAPI v3 schema that a CustomResourceDefinition takes.

Pydantic emits references, `anyOf` with null, titles and `additionalProperties: false`; a structural schema has none of
them. Rules of the form: https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

__all__ = ["structural_schema"]

Schema = dict[str, Any]

_DROPPED = ("title", "$defs")
_NULLABLE = "x-tunesmith-nullable"  # marks an object that stays absent unless given; never leaves this module


def structural_schema(model: type[BaseModel]) -> Schema:
    """Return the structural schema of a kind: `spec` with defaults, `status` with one for an object that is new.

    Metadata is left to Kubernetes.

    Raises:
        ValueError: the model uses a construct that has no structural form.
    """
    document = model.model_json_schema(by_alias=True)
    root = _rewrite(document, document.get("$defs", {}), path=model.__name__)
    properties = root["properties"]
    properties["apiVersion"] = {"type": "string", "description": "Version of this object's schema."}
    properties["kind"] = {"type": "string", "description": "Kind of this object."}
    properties["metadata"] = {"type": "object"}
    _fill_object_defaults(properties["spec"])
    status = properties["status"]
    new = {name: value for name, value in status.items() if name == "default"}
    properties["status"] = _without_defaults(status) | new
    root["required"] = ["metadata", "spec"]
    return root


def _rewrite(node: Schema, definitions: dict[str, Schema], path: str) -> Schema:
    node = _resolve(node, definitions)
    node = _unwrap_nullable(node, definitions, path)
    result: Schema = {}
    for key, value in node.items():
        if key in _DROPPED or (key == "default" and value is None):
            continue
        if key == "additionalProperties" and isinstance(value, bool):
            continue
        if key == "const":
            result["enum"] = [value]
        elif key == "properties":
            result[key] = {name: _rewrite(child, definitions, f"{path}.{name}") for name, child in value.items()}
        elif key in ("items", "additionalProperties"):
            result[key] = _rewrite(value, definitions, f"{path}[]")
        else:
            result[key] = value
    if "x-kubernetes-int-or-string" in result:
        result.pop("type", None)
    elif "type" not in result:
        raise ValueError(f"{path}: no single type in {sorted(result)}")
    if "description" in result:
        result["description"] = " ".join(str(result["description"]).split())
    return result


def _resolve(node: Schema, definitions: dict[str, Schema]) -> Schema:
    reference = node.get("$ref")
    if reference is None:
        return node
    target = _resolve(definitions[reference.rsplit("/", 1)[1]], definitions)
    siblings = {key: value for key, value in node.items() if key != "$ref"}
    merged = {**target, **siblings}
    rules = [*target.get("x-kubernetes-validations", []), *siblings.get("x-kubernetes-validations", [])]
    if rules:
        merged["x-kubernetes-validations"] = rules
    return merged


def _unwrap_nullable(node: Schema, definitions: dict[str, Schema], path: str) -> Schema:
    choices = node.get("anyOf")
    if choices is None:
        return node
    real = [choice for choice in choices if choice.get("type") != "null"]
    if len(real) != 1:
        raise ValueError(f"{path}: a union of {len(real)} types has no structural form")
    siblings = {key: value for key, value in node.items() if key != "anyOf"}
    return {**_resolve(real[0], definitions), **siblings, _NULLABLE: True}


def _fill_object_defaults(node: Schema) -> None:
    """Give optional objects whose fields all have defaults `default: {}`, so that the API server fills those in."""
    required = set(node.get("required", ()))
    if isinstance(node.get("items"), dict):
        _fill_object_defaults(node["items"])
    for name, child in node.get("properties", {}).items():
        nullable = child.pop(_NULLABLE, False)
        _fill_object_defaults(child)
        if child.get("type") != "object" or "properties" not in child:
            continue
        if name not in required and not child.get("required") and not nullable:
            child["default"] = {}


def _without_defaults(node: Schema) -> Schema:
    result = {key: value for key, value in node.items() if key not in ("default", _NULLABLE)}
    if "properties" in result:
        result["properties"] = {name: _without_defaults(child) for name, child in result["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(result.get(key), dict):
            result[key] = _without_defaults(result[key])
    return result
