"""Why a manifest is refused, in the API server's words, without an API server.

The same pydantic types that the CRD is generated from check shapes; the CRD's CEL rules are evaluated as they are in
those types. So each rule is written once, and a manifest is refused here exactly as in a cluster.
`tests/integration/test_samples.py` compares the two, line by line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_cli.schema import JSON, document_schema, node_at, parts, path_of

__all__ = ["refusals"]


def refusals(document: Mapping[str, Any], kind: type[BaseModel] = FineTuneJob) -> list[str]:
    """Return what the API server would say against a manifest, one line for each fault; none for a good one.

    Rules that span fields are looked at once every field has the right shape, as the API server does.
    """
    schema = document_schema(kind)
    document = _without_nulls(document)
    found = list(_repeated(document, schema))
    try:
        # strict, and from JSON: "80" is no number, yet "LoRA" is a method
        resource = kind.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        return found + [_words(fault, document, schema) for fault in error.errors(include_url=False)]
    if found:
        return found
    resolved = resource.model_dump(mode="json", by_alias=True, exclude_none=True)
    return list(_broken_rules(resolved, schema))


# --- shapes ---


def _words(fault: ErrorDetails, document: Mapping[str, Any], schema: JSON) -> str:
    where = [part for part in fault["loc"] if part != "__root__"]
    path, node = path_of(where), node_at(schema, where)
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        return f'unknown field "{path}"'
    if kind == "missing":
        return f"{path}: Required value"
    value = _at(document, where)
    if kind in ("enum", "literal_error"):
        known = ", ".join(json.dumps(entry) for entry in node.get("enum", [node.get("const")]))
        return f"{path}: Unsupported value: {_shown(value)}: supported values: {known}"
    if kind == "string_too_long":
        return f"{path}: Too long: may not be more than {context['max_length']} bytes"
    if kind == "too_long":
        return f"{path}: Too many: {len(value)}: must have at most {context['max_length']} items"
    if kind == "too_short":
        least = context["min_length"]
        return f"{path}: Invalid value: {context['actual_length']}: {path} in body should have at least {least} items"
    complaint = _complaint(kind, context)
    if complaint is not None:
        return f"{path}: Invalid value: {_shown(value)}: {path} in body {complaint}"
    if kind.endswith("_type"):
        found, wanted = json.dumps(_type_name(value)), node.get("type", "integer,string")
        return f"{path}: Invalid value: {found}: {path} in body must be of type {wanted}: {found}"
    return f"{path}: Invalid value: {_shown(value)}: {fault['msg']}"


def _complaint(kind: str, context: Mapping[str, Any]) -> str | None:
    match kind:
        case "string_pattern_mismatch":
            return f"should match '{context['pattern']}'"
        case "string_too_short":
            return f"should be at least {context['min_length']} chars long"
        case "greater_than_equal":
            return f"should be greater than or equal to {_shown(context['ge'])}"
        case "less_than_equal":
            return f"should be less than or equal to {_shown(context['le'])}"
        case "multiple_of":
            return f"should be a multiple of {context['multiple_of']}"
    return None


def _type_name(value: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "object"


def _shown(value: Any) -> str:
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value, ensure_ascii=False)


def _at(document: Any, where: list[str | int]) -> Any:
    for key in where:
        document = document[key]
    return document


# --- what pydantic lets pass ---


def _without_nulls(value: Any) -> Any:
    """A null counts as absent, as in a cluster."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _repeated(document: Mapping[str, Any], schema: JSON) -> Iterator[str]:
    for part in parts(document, schema):
        if part.node.get("x-kubernetes-list-type") == "set" and isinstance(part.value, list):
            for number, entry in enumerate(part.value):
                if entry in part.value[:number]:
                    yield f"{path_of((*part.path, number))}: Duplicate value: {_shown(entry)}"


# --- rules that span fields ---


def _broken_rules(document: JSON, schema: JSON) -> Iterator[str]:
    import cel  # takes most of a second, and is of use here only

    for part in parts(document, schema):
        for rule in part.node.get("x-kubernetes-validations", ()):
            if "oldSelf" in rule["rule"] or cel.evaluate(rule["rule"], {"self": part.value}) is True:
                continue
            simple = not isinstance(part.value, dict | list)
            path = path_of(part.path) or "<nil>"
            yield f"{path}: Invalid value: {_shown(part.value) + ': ' if simple else ''}{rule['message']}"
