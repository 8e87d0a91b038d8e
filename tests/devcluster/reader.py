"""Reads objects without starting a program: tests ask several times a second, and each kubectl costs them tenths of one.

Called by ``Cluster.get`` and ``Cluster.get_all``. What a test shows of kubectl itself, its columns or its words, it asks of kubectl.
"""

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from devcluster.controlplane import Api
from devcluster.errors import ClusterFailed

DISCOVERY = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
SECONDS = 30.0
NOT_FOUND = 404


@dataclass(frozen=True)
class Resource:
    """Where objects of a kind are."""

    api: str
    """`/api/v1` or `/apis/GROUP/VERSION`."""
    plural: str
    namespaced: bool
    api_version: str
    kind: str

    def path(self, namespace: str, name: str = "", selector: str = "") -> str:
        """The path of one object, or of all with those labels."""
        place = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        query = f"?labelSelector={urllib.parse.quote(selector)}" if selector else ""
        return f"{self.api}{place}/{self.plural}{f'/{name}' if name else ''}{query}"


class Reader:
    """Reads objects of any kind, by the names that kubectl knows it by."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: dict[str, Resource] = {}

    def get(self, kind: str, name: str, namespace: str) -> dict[str, Any]:
        """An object; an empty dict where there is none."""
        return self._read(self._resource(kind).path(namespace, name)) or {}

    def get_all(self, kind: str, namespace: str, selector: str = "") -> list[dict[str, Any]]:
        """The objects of a kind."""
        resource = self._resource(kind)
        found = self._read(resource.path(namespace, selector=selector)) or {}
        named = {"apiVersion": resource.api_version, "kind": resource.kind}  # which a list leaves out
        return [named | item for item in found.get("items", ())]

    def _resource(self, kind: str) -> Resource:
        if kind not in self._known:  # definitions come while a cluster runs
            self._known = dict(self._resources())
        if kind not in self._known:
            raise ClusterFailed(f"the API server has no resource {kind!r}")
        return self._known[kind]

    def _resources(self) -> Iterator[tuple[str, Resource]]:
        """Every name with its resource, the ones that win last."""
        groups = [*self._discovered("/apis"), *self._discovered("/api")]
        for group in groups:
            name = group.get("metadata", {}).get("name", "")
            for version in reversed(group.get("versions", ())):  # the preferred one stands first
                for entry in version.get("resources", ()):
                    yield from _named(name, version["version"], entry)

    def _discovered(self, path: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (self._read(path, DISCOVERY) or {}).get("items", [])
        return found

    def _read(self, path: str, accept: str = "application/json") -> dict[str, Any] | None:
        """The answer to a GET; None where there is nothing of that name. What else goes wrong is never taken for that."""
        try:
            with self._api.open(path, accept, SECONDS) as answer:
                body: dict[str, Any] = json.load(answer)
                return body
        except urllib.error.HTTPError as error:
            if error.code == NOT_FOUND:
                return None
            raise ClusterFailed(f"GET {path}: {error.code} {error.read(2000).decode(errors='replace')}") from error
        except OSError as error:
            raise ClusterFailed(f"GET {path}: {error}") from error


def _named(group: str, version: str, entry: dict[str, Any]) -> Iterator[tuple[str, Resource]]:
    api_version = f"{group}/{version}" if group else version
    resource = Resource(
        api=f"/apis/{api_version}" if group else f"/api/{version}",
        plural=entry["resource"],
        namespaced=entry["scope"] == "Namespaced",
        api_version=api_version,
        kind=entry["responseKind"]["kind"],
    )
    names = (resource.plural, entry.get("singularResource", ""), resource.kind.lower(), *entry.get("shortNames", ()))
    for name in filter(None, names):
        yield name, resource
        if group:
            yield f"{name}.{group}", resource
