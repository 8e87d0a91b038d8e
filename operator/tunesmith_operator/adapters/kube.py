"""The API server, through the official client: create, patch, delete, server-side apply of statuses.

Its calls block, so they run in a bounded pool of threads.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kubernetes.client
import kubernetes.config
import urllib3

from tunesmith_api import __version__, keys
from tunesmith_operator.adapters.errors import Gone, Transient, classify
from tunesmith_operator.core.kubernetes.manifest import JSON
from tunesmith_operator.core.kubernetes.resources import Resource

__all__ = ["KubernetesCluster", "client_configuration"]

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
REQUEST_TIMEOUT = (5.0, 30.0)
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


def client_configuration() -> kubernetes.client.Configuration:
    """Where the API server is and how to log in: the pod's ServiceAccount, else KUBECONFIG or ~/.kube/config.

    Raises:
        kubernetes.config.ConfigException: neither is there.
    """
    configuration = kubernetes.client.Configuration()
    if _SERVICE_ACCOUNT.exists():
        kubernetes.config.load_incluster_config(client_configuration=configuration)
    else:
        kubernetes.config.load_kube_config(client_configuration=configuration)
    return configuration


class KubernetesCluster:
    """Writes to one cluster. All methods raise `ClusterError`s."""

    def __init__(
        self,
        configuration: kubernetes.client.Configuration,
        threads: int = 4,
        on_request: Callable[[str, str, str], None] = lambda verb, resource, code: None,
        timeout: tuple[float, float] = REQUEST_TIMEOUT,
        allowed: Callable[[], bool] = lambda: True,
    ) -> None:
        configuration.connection_pool_maxsize = threads
        # a request is tried again by the engine's backoff, which knows the pace; urllib3 would sleep in the thread
        configuration.retries = False
        self._client = kubernetes.client.ApiClient(configuration)
        self._client.user_agent = f"{keys.FIELD_MANAGER}/{__version__}"
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="kube")
        self._on_request, self._timeout, self._allowed = on_request, timeout, allowed

    async def create(self, resource: Resource, namespace: str, body: JSON) -> JSON:
        """Create an object; returns it as stored. One of that name that is there already stays as it is."""
        query = [("fieldManager", keys.FIELD_MANAGER)]
        return await self._run("create", resource, "POST", _path(resource, namespace), query, body, "application/json")

    async def read(self, resource: Resource, namespace: str, name: str) -> JSON | None:
        """The object as stored; None where there is none."""
        path = _path(resource, namespace, name)
        try:
            return await self._run("get", resource, "GET", path, [], None, "application/json")
        except Gone:
            return None

    async def replace(self, resource: Resource, namespace: str, name: str, body: JSON) -> JSON:
        """Replace the object of the version that the body names; returns it as stored."""
        path = _path(resource, namespace, name)
        return await self._run("update", resource, "PUT", path, [], body, "application/json")

    async def find(self, resource: Resource, namespace: str, name: str) -> JSON | None:
        """The object of that name, whoever it belongs to; None where there is none."""
        query = [("fieldSelector", f"metadata.name={name}")]
        found = await self._run("list", resource, "GET", _path(resource, namespace), query, None, "application/json")
        return next(iter(found.get("items") or ()), None)

    async def labelled(self, resource: Resource, namespace: str, labels: str) -> list[JSON]:
        """The objects that the label selector finds."""
        query = [("labelSelector", labels)]
        found = await self._run("list", resource, "GET", _path(resource, namespace), query, None, "application/json")
        return list(found.get("items") or ())

    async def patch(self, resource: Resource, namespace: str, name: str, uid: str, body: JSON) -> JSON:
        """Merge patch of the object with that uid; returns it as stored. Another of that name is refused."""
        query = [("fieldManager", keys.FIELD_MANAGER)]
        patch = body | {"metadata": {**body.get("metadata", {}), "uid": uid}}
        return await self._run("patch", resource, "PATCH", _path(resource, namespace, name), query, patch, MERGE)

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> None:
        """Delete the object of that uid, its dependents in the background. Gone, or another by now: fine."""
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        path = _path(resource, namespace, name)
        await self._run("delete", resource, "DELETE", path, [], body, "application/json", accept=(404, 409))

    async def apply_status(
        self, resource: Resource, namespace: str, name: str, uid: str, version: str, status: JSON
    ) -> JSON:
        """Server-side apply of the status subresource; returns the object as stored.

        A status that was worked out from an older version is refused: it may know less than the one that is there.
        """
        path = f"{_path(resource, namespace, name)}/status"
        # the uid makes the apply fail for an object of that name that was created in the meantime
        metadata = {"name": name, "namespace": namespace, "uid": uid, "resourceVersion": version}
        body = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata, "status": status}
        query = [("fieldManager", keys.FIELD_MANAGER), ("force", "true")]
        return await self._run("status", resource, "PATCH", path, query, body, APPLY)

    def close(self) -> None:
        """Let running requests finish; start no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.rest_client.close()

    async def _run(
        self,
        verb: str,
        resource: Resource,
        method: str,
        path: str,
        query: list[tuple[str, str]],
        body: JSON | None,
        content_type: str,
        accept: tuple[int, ...] = (),
    ) -> JSON:
        if not self._allowed():
            raise Transient("another operator may be leading by now")
        loop = asyncio.get_running_loop()
        code = 0
        try:
            code, text, patience = await loop.run_in_executor(
                self._pool, self._call, method, path, query, body, content_type
            )
        finally:
            self._on_request(verb, resource.plural, str(code) if code else "none")
        if 200 <= code < 300 or code in accept:
            answer: Any = json.loads(text or b"{}")
            return answer if isinstance(answer, dict) else {}
        raise classify(code, text, patience)

    def _call(
        self, method: str, path: str, query: list[tuple[str, str]], body: JSON | None, content_type: str
    ) -> tuple[int, bytes, str | None]:
        """Status code, body and Retry-After of the answer."""
        headers = {"Accept": "application/json", "Content-Type": content_type}
        request = self._client.param_serialize(
            method, path, query_params=query, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        try:
            response = self._client.call_api(*request, _request_timeout=self._timeout)
            return response.status, response.read(), response.headers.get("Retry-After")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Transient(f"the API server can't be reached: {error}") from error


def _path(resource: Resource, namespace: str, name: str | None = None) -> str:
    root = f"/apis/{resource.group}/{resource.version}" if resource.group else f"/api/{resource.version}"
    tail = f"/{name}" if name is not None else ""
    return f"{root}/namespaces/{namespace}/{resource.plural}{tail}"
