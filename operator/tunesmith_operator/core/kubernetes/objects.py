"""Typed views of objects, read from what the watches deliver. Only the fields that decisions need.

`kubernetes.workloads` and `pods.view` add Jobs, Deployments and pods.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

from tunesmith_api import keys
from tunesmith_operator.core.text import parse_time

__all__ = [
    "ChildView",
    "ConditionView",
    "ConfigMapView",
    "RejectionView",
    "ServiceView",
    "SpecView",
    "conditions_of",
    "content_of",
    "digests",
    "true_condition",
]

Raw = Mapping[str, Any]


def _meta(raw: Raw) -> dict[str, Any]:
    meta = raw["metadata"]
    owners = [owner["uid"] for owner in meta.get("ownerReferences", ()) if owner.get("controller")]
    return {
        "namespace": meta.get("namespace", ""),
        "name": meta["name"],
        "uid": meta.get("uid", ""),
        "version": int(meta.get("resourceVersion") or 0),
        "owner_uid": owners[0] if owners else "",
        "labels": _ours(meta.get("labels")),
        "annotations": _ours(meta.get("annotations")),
        "created": parse_time(meta.get("creationTimestamp")),
        "deleting": meta.get("deletionTimestamp") is not None,
    }


def _ours(entries: Mapping[str, str] | None) -> dict[str, str]:
    """Labels or annotations that mean something here, each text once in memory: thousands of objects have the same."""
    return {
        sys.intern(name): sys.intern(value)
        for name, value in (entries or {}).items()
        if name.startswith(f"{keys.GROUP}/") or name == keys.LABEL_COMPONENT
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildView:
    """What every child has."""

    namespace: str
    name: str
    uid: str = ""
    version: int = 0
    owner_uid: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    created: datetime | None = None
    deleting: bool = False
    content: bytes = b""
    """What `drift` compares of it, as compact JSON: its own fields, or digests of them. Empty: nothing is compared."""

    @classmethod
    def of(cls, raw: Raw) -> Self:
        """Read the object as the API server delivers it."""
        return cls(**_meta(raw), **cls._fields(raw))

    @classmethod
    def _fields(cls, raw: Raw) -> dict[str, Any]:
        return {}

    @property
    def spec_hash(self) -> str:
        """Hash of the manifest that it was last applied from."""
        return self.annotations.get(keys.ANNOTATION_SPEC_HASH, "")


@dataclass(frozen=True, slots=True)
class ConditionView:
    """A condition of a built-in kind."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    since: datetime | None = None

    @classmethod
    def of(cls, raw: Raw) -> ConditionView:
        """Read one entry of status.conditions."""
        since = parse_time(raw.get("lastTransitionTime"))
        return cls(raw["type"], raw.get("status", ""), raw.get("reason", ""), raw.get("message", ""), since)


def conditions_of(raw: Raw) -> tuple[ConditionView, ...]:
    """The conditions of an object, as the API server delivers it."""
    return tuple(ConditionView.of(entry) for entry in raw.get("status", {}).get("conditions") or ())


def true_condition(conditions: tuple[ConditionView, ...], type_: str) -> ConditionView | None:
    """The condition of that type, where it is True."""
    return next((entry for entry in conditions if entry.type == type_ and entry.status == "True"), None)


def content_of(**fields: Any) -> bytes:
    """The fields in the form of `ChildView.content`."""
    return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()


def digests(data: Mapping[str, str]) -> dict[str, str]:
    """A ConfigMap's entries, each in few bytes."""
    return {name: hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for name, text in data.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecView(ChildView):
    """An object whose whole spec is the operator's: a NetworkPolicy, a PodDisruptionBudget."""

    @classmethod
    def _fields(cls, raw: Raw) -> dict[str, Any]:
        return {"content": content_of(spec=raw.get("spec") or {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceView(SpecView):
    """A Service."""

    selector: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def _fields(cls, raw: Raw) -> dict[str, Any]:
        spec = raw.get("spec") or {}
        return {"selector": dict(spec.get("selector") or {}), "content": content_of(spec=spec)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigMapView(ChildView):
    """A ConfigMap. Its data is kept only where a history of revisions may have to be rebuilt from it."""

    data: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def _fields(cls, raw: Raw) -> dict[str, Any]:
        data = dict(raw.get("data") or {})
        kept = keys.LABEL_REVISION in (raw["metadata"].get("labels") or {})
        return {"data": data if kept else {}, "content": content_of(data=digests(data))}


@dataclass(frozen=True, slots=True)
class RejectionView:
    """The Job controller could not create a pod: an Event of reason FailedCreate."""

    job_uid: str
    message: str
    first_seen: datetime | None
    last_seen: datetime | None

    @classmethod
    def of(cls, raw: Raw) -> RejectionView:
        """Read a core/v1 Event."""
        series = raw.get("series") or {}
        last = series.get("lastObservedTime") or raw.get("lastTimestamp") or raw.get("eventTime")
        first = raw.get("firstTimestamp") or raw.get("eventTime") or last
        uid = raw.get("involvedObject", {}).get("uid", "")
        return cls(uid, raw.get("message", ""), parse_time(first), parse_time(last))
