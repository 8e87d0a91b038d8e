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
    "DecimalString",
    "DnsLabel",
    "EndpointURL",
    "Metrics",
    "Number",
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


DECIMAL_PATTERN = r"^[0-9]+(\.[0-9]+)?([eE]-?[0-9]{1,2})?$"
DecimalString = Annotated[str, Field(pattern=DECIMAL_PATTERN, max_length=16)]
"""A non-negative number written as text ("2e-4", "0.03"): Kubernetes APIs carry no floats."""

Number = Annotated[
    str,
    BeforeValidator(_number_to_text),
    Field(pattern=DECIMAL_PATTERN, max_length=16),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": DECIMAL_PATTERN, "maxLength": 16, "minimum": 0}),
]
"""The same where whole numbers are usual: they may be written without quotes."""


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

S3_URI_PATTERN = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9!_.*'()=+@-]+)*/?$"
S3Uri = Annotated[str, Field(pattern=S3_URI_PATTERN, max_length=512)]
"""`s3://bucket/key`: a bucket, and a key of the characters that every S3 store accepts."""

_HF = r"hf://(datasets/)?[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+(/[A-Za-z0-9!_.*'()=+@-]+)*/?"
_PVC = r"pvc://[a-z0-9]([-a-z0-9]*[a-z0-9])?(/[A-Za-z0-9!_.*'()=+@-]+)*/?"
WritableUri = Annotated[str, Field(pattern=f"^({S3_URI_PATTERN[1:-1]}|{_PVC})$", max_length=512)]
"""A place that can be written: `s3://bucket/key`, or `pvc://claim/path` in a PersistentVolumeClaim of the namespace."""
Uri = Annotated[str, Field(pattern=f"^({S3_URI_PATTERN[1:-1]}|{_PVC}|{_HF})$", max_length=512)]
"""A place that can be read: also `hf://owner/name` of the Hugging Face Hub."""

NO_PASSWORD_IN_URL = cel(
    "!self.matches('^[a-zA-Z]+://[^/?#]*@')",
    "a URL must hold no user name and no password: it is copied into ConfigMaps, which many may read. Put them into a "
    "Secret and name it in secretRef",
)
EndpointURL = Annotated[
    str,
    Field(
        pattern=r"^https?://[^/\s]+/?$",
        max_length=253,
        json_schema_extra={"x-kubernetes-validations": [NO_PASSWORD_IN_URL]},
    ),
]
"""Address of a service, without a path and without credentials."""
