"""The base classes and field types that every API type and contract is built from."""

from __future__ import annotations

import hashlib
import json
from math import isfinite
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel

__all__ = [
    "NO_PASSWORD_IN_URL",
    "Contract",
    "DnsLabel",
    "EndpointURL",
    "Metrics",
    "NonNegative",
    "Quantity",
    "S3Uri",
    "SpecModel",
    "StatusModel",
    "Uri",
    "WritableUri",
    "cel",
    "digest_of",
]


class SpecModel(BaseModel):
    """What a user writes: frozen, camelCase on the wire, unknown fields refused."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")


class StatusModel(BaseModel):
    """What the operator reports: frozen, camelCase on the wire, unknown fields of a newer version ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")


class Contract(BaseModel):
    """A JSON document that one process writes and another reads. `schemaVersion` guards against a mismatch."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")

    def to_json(self) -> str:
        """Serialize to compact JSON with camelCase keys, absent values left out."""
        return self.model_dump_json(by_alias=True, exclude_none=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse and validate.

        Raises:
            pydantic.ValidationError: the text is no document of this kind or of another schema version.
        """
        return cls.model_validate_json(text)


def digest_of(document: object) -> str:
    """Return the hex sha256 of the canonical JSON form (sorted keys, no spaces) of plain data."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def cel(rule: str, message: str) -> dict[str, Any]:
    """One CEL validation rule for `json_schema_extra={"x-kubernetes-validations": [cel(...)]}`."""
    return {"rule": rule, "message": message}


def _number_to_text(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
"""A number of 0 or more without quotes: 2e-4, 0.03, 1 (docs/adr/0017-decimals-are-numbers.md)."""


def _finite(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {
        name: number
        for name, number in value.items()
        if number is not None and not (isinstance(number, float) and not isfinite(number))
    }


Metrics = Annotated[dict[str, float], BeforeValidator(_finite)]
"""Metrics by name, without those that are not finite: JSON has no such numbers, and who reads it would refuse all."""

QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
Quantity = Annotated[
    str,
    BeforeValidator(_number_to_text),
    Field(pattern=QUANTITY_PATTERN, max_length=32),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": QUANTITY_PATTERN, "maxLength": 32}),
]
"""A Kubernetes resource quantity ("500m", "3Gi", 2)."""

DNS_LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DnsLabel = Annotated[str, Field(pattern=DNS_LABEL_PATTERN, min_length=1, max_length=63)]

_PLACES = {
    "s3": (
        "s3://bucket/key",
        r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9](/.*)?",
        "a bucket's name has 3 to 63 letters, digits, dots, hyphens and underscores",
    ),
    "pvc": (
        "pvc://claim/path",
        r"pvc://[a-z0-9]([-a-z0-9]*[a-z0-9])?(/.*)?",
        "a PersistentVolumeClaim's name has lower-case letters, digits and hyphens",
    ),
    "hf": (
        "hf://owner/name",
        r"hf://(datasets/)?[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+(/.*)?)?/?",
        "owner and name of a repository of the Hub have letters, digits, dots, hyphens and underscores",
    ),
}
"""Scheme → how its URIs are written, a pattern for them, and what that asks of the first part."""


def _place(*schemes: str) -> Any:
    """A URI of these schemes. What is wrong is said in words, so there are rules and no pattern."""
    forms = [_PLACES[scheme][0] for scheme in schemes]
    known = f"{', '.join(forms[:-1])} or {forms[-1]}" if forms[1:] else forms[0]
    rules = [
        cel(f"self.matches('^({'|'.join(schemes)})://')", f"a URI begins with its scheme: {known}"),
        *(
            cel(f"!self.startsWith('{scheme}://') || self.matches('^{_PLACES[scheme][1]}$')", _PLACES[scheme][2])
            for scheme in schemes
        ),
        cel(
            r"!self.matches('^[a-z0-9]+://.*//') && !self.matches('[\\x00-\\x1f\\x7f]')",
            "a path has no empty part (a//b) and no control characters",
        ),
    ]
    extra: dict[str, Any] = {"x-kubernetes-validations": rules}
    return Field(min_length=1, max_length=512, json_schema_extra=extra)


S3Uri = Annotated[str, _place("s3")]
"""`s3://bucket/key`."""
WritableUri = Annotated[str, _place("s3", "pvc")]
"""A place that can be written: `s3://bucket/key`, or `pvc://claim/path` in a PersistentVolumeClaim of the namespace."""
Uri = Annotated[str, _place("s3", "pvc", "hf")]
"""A place that can be read: also `hf://owner/name` of the Hugging Face Hub, or `hf://name` of its first models."""

NO_PASSWORD_IN_URL = cel(
    "!self.matches('^[a-zA-Z]+://[^/?#]*@')",
    "a URL must hold no user name and no password: it is copied into ConfigMaps, which many may read. Put them into a "
    "Secret and name it in secretRef",
)
_ADDRESS = cel(
    r"self.matches('^https?://[^/?#\\s]+(/[^?#\\s]*)?$')",
    "an address begins with http:// or https:// and has no query: https://store.example.com:8333",
)
EndpointURL = Annotated[
    str, Field(max_length=253, json_schema_extra={"x-kubernetes-validations": [_ADDRESS, NO_PASSWORD_IN_URL]})
]
"""Address of a service, without credentials."""
