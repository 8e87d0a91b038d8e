"""The Lease that operators agree by, read and written as leader election needs it."""

from __future__ import annotations

from tunesmith_operator.adapters.kube import KubernetesCluster
from tunesmith_operator.core.kubernetes.manifest import JSON
from tunesmith_operator.core.kubernetes.resources import Resource

__all__ = ["KubernetesLease"]

_LEASES = Resource("coordination.k8s.io", "v1", "Lease", "leases")


class KubernetesLease:
    """One Lease."""

    def __init__(self, cluster: KubernetesCluster, namespace: str, name: str) -> None:
        self._cluster, self._namespace, self._name = cluster, namespace, name

    async def read(self) -> JSON | None:
        """The Lease; None where there is none."""
        return await self._cluster.read(_LEASES, self._namespace, self._name)

    async def write(self, spec: JSON, version: str | None) -> JSON:
        """Create it (version None) or replace what has that version; returns it as stored."""
        metadata = {"name": self._name, "namespace": self._namespace}
        body: JSON = {"apiVersion": _LEASES.api_version, "kind": _LEASES.kind, "metadata": metadata, "spec": spec}
        if version is None:
            return await self._cluster.create(_LEASES, self._namespace, body)
        metadata["resourceVersion"] = version
        return await self._cluster.replace(_LEASES, self._namespace, self._name, body)
