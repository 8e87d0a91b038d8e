"""Kubernetes Events about custom resources: what `kubectl describe` lists below."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

from tunesmith_api.model import digest_of
from tunesmith_operator.adapters.errors import AlreadyExists
from tunesmith_operator.adapters.kube import KubernetesCluster
from tunesmith_operator.core.kubernetes.manifest import JSON
from tunesmith_operator.core.kubernetes.resources import Key, Resource
from tunesmith_operator.core.status.transitions import EventNote
from tunesmith_operator.core.text import shortened

__all__ = ["EventRecorder"]

_EVENTS = Resource("events.k8s.io", "v1", "Event", "events")
_MAX_NOTE = 1024


class EventRecorder:
    """Posts events; the same one twice in one second is one event."""

    def __init__(self, cluster: KubernetesCluster, instance: str) -> None:
        self._cluster, self._instance = cluster, instance

    async def record(self, resource: Resource, key: Key, uid: str, note: EventNote, now: datetime) -> None:
        """Post one event.

        Raises:
            ClusterError: it could not be posted.
        """
        with contextlib.suppress(AlreadyExists):
            await self._cluster.create(_EVENTS, key.namespace, self._body(resource, key, uid, note, now))

    def _body(self, resource: Resource, key: Key, uid: str, note: EventNote, now: datetime) -> JSON:
        moment = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        suffix = digest_of([uid, note.reason, note.message, int(now.timestamp())])[:16]
        return {
            "apiVersion": _EVENTS.api_version,
            "kind": _EVENTS.kind,
            "metadata": {"name": f"{key.name}.{suffix}", "namespace": key.namespace},
            "eventTime": moment,
            "reportingController": "tunesmith.dev/operator",
            "reportingInstance": self._instance[:128],
            "action": "Reconcile",
            "type": note.type,
            "reason": note.reason,
            "note": shortened(note.message, _MAX_NOTE),
            "regarding": {
                "apiVersion": resource.api_version,
                "kind": resource.kind,
                "name": key.name,
                "namespace": key.namespace,
                "uid": uid,
            },
        }
