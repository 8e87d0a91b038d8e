"""Manifests: what the operator writes to the API server, with its owner, labels and hash.

A child is created by POST, which touches nothing that is there, and changed by a merge patch that names its uid. It is
no server-side apply: unforced, that refuses only where another field manager has other values. The operator is one
manager for all its objects, so two of them with a child's name in common would take it from each other in silence; and
somebody's object of that name without our fields would get an owner that takes it along when it is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith_api import keys
from tunesmith_api.model import digest_of
from tunesmith_operator.core.kubernetes.resources import Resource

__all__ = ["JSON", "Manifest", "Owner", "foreign_owner"]

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


def foreign_owner(manifest: Manifest, found: Mapping[str, Any]) -> str | None:
    """Why an object that has the manifest's name is not to be touched; None where it has the same owner."""
    mine = manifest.body["metadata"]["ownerReferences"][0]
    owner = next((it for it in found["metadata"].get("ownerReferences") or () if it.get("controller")), None)
    if owner is None:
        return (
            "there is one of this name already, which belongs to nobody and is left as it is. Delete it, if it isn't "
            f"needed, or give this {mine['kind']} another name"
        )
    if owner["uid"] == mine["uid"]:
        return None
    if (owner["kind"], owner["name"]) == (mine["kind"], mine["name"]):
        return f"there is one of an earlier {owner['kind']} {owner['name']}, which is waited for until it is gone"
    return (
        f"there is one of this name already, which belongs to {owner['kind']} {owner['name']} and is left as it is. "
        f"Give this {mine['kind']} or that {owner['kind']} another name"
    )
