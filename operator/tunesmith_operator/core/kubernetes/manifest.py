"""Manifests: what the operator writes to the API server, with its owner, labels and hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith_api import keys
from tunesmith_api.model import digest_of
from tunesmith_operator.core.kubernetes.resources import Resource

__all__ = ["JSON", "Manifest", "Owner"]

JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One object to be written. `body` is its complete JSON form."""

    resource: Resource
    namespace: str
    name: str
    hash: str
    body: JSON = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.resource.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Owner:
    """The custom resource that children belong to, and the labels that they all carry."""

    resource: Resource
    namespace: str
    name: str
    uid: str
    label: str

    @property
    def selector(self) -> dict[str, str]:
        """Labels that every child of this owner has."""
        return {keys.LABEL_MANAGED_BY: keys.MANAGED_BY, self.label: self.name}

    def manifest(
        self,
        resource: Resource,
        name: str,
        fields: Mapping[str, Any],
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
    ) -> Manifest:
        """A child of this owner: `fields` are the object's own top-level fields (spec, data, …).

        Its hash covers everything in it and is its spec-hash annotation, so a child is written again only when
        something about it has to change.
        """
        reference = {
            "apiVersion": self.resource.api_version,
            "kind": self.resource.kind,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": False,
        }
        metadata: JSON = {
            "name": name,
            "namespace": self.namespace,
            "labels": self.selector | dict(labels or {}),
            "annotations": dict(annotations or {}),
            "ownerReferences": [reference],
        }
        body: JSON = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata, **fields}
        digest = digest_of(body)[:16]
        metadata["annotations"] = metadata["annotations"] | {keys.ANNOTATION_SPEC_HASH: digest}
        return Manifest(resource, self.namespace, name, digest, body)
