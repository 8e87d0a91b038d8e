"""What the API server refuses of a status by the CRD's schema, for the fake cluster and for tests of what pods send."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker

from tunesmith_crdgen.crd import KINDS, custom_resource_definition

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
_CHECKER = FormatChecker(formats=())
_CHECKER.checks("date-time")(lambda value: not isinstance(value, str) or bool(_TIME.fullmatch(value)))


@cache
def _validator(kind: str) -> Draft202012Validator:
    (info,) = [it for it in KINDS if it.kind == kind]
    schema = custom_resource_definition(info)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return Draft202012Validator(schema["properties"]["status"], format_checker=_CHECKER)


def refusal(kind: str, status: dict[str, Any]) -> str | None:
    """The API server's words against the status; None where it takes it."""
    for error in _validator(kind).iter_errors(status):
        return f"status.{'.'.join(str(part) for part in error.absolute_path)}: Invalid value: {error.message}"
    too_large = [value for value in _numbers(status) if not -(2**63) <= value < 2**63]
    return f"status: Invalid value: {too_large[0]}" if too_large else None


def _numbers(value: Any) -> list[int]:
    if isinstance(value, dict):
        return [it for inner in value.values() for it in _numbers(inner)]
    if isinstance(value, list):
        return [it for inner in value for it in _numbers(inner)]
    return [value] if isinstance(value, int) else []
