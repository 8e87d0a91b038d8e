"""Lists and watches of the API server, page by page and event by event. `engine.informer` consumes them.

The official client's informer reads whole lists at once, builds a model of every object and holds a thread for each
kind; its configuration, with the credentials and their renewal, is what is used here.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import aiohttp
import kubernetes.client

from tunesmith_api import __version__, keys
from tunesmith_operator.adapters.errors import Transient, classify
from tunesmith_operator.core.kubernetes.resources import EVENT, Resource

__all__ = ["ApiServerSource", "Change", "Page", "Selectors"]

Raw = Mapping[str, Any]
PAGE_SIZE: Final = 100
"""All kinds are listed side by side when the operator starts: parsed pages are most of the memory that takes."""
WATCH_SECONDS: Final = 300
"""A watch is ended by the API server after about so long, and begun again where it ended."""
INACTIVE_SECONDS: Final = 150.0
"""The API server sends a bookmark every minute: a stream that is silent for longer than this is dead."""
SILENT: Final = frozenset({EVENT})
"""Kinds that it keeps no cache of, and so sends no bookmarks for: their streams end before they could seem dead."""
SILENT_WATCH_SECONDS: Final = 60


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list. `version` is that of the whole list; `token` asks for the next part, empty at the end."""

    items: Sequence[Raw]
    version: str
    token: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """One event of a watch."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    object: Raw


@dataclass(frozen=True, slots=True)
class Selectors:
    """Which objects of a kind are listed and watched."""

    labels: str = ""
    fields: str = ""

    def query(self) -> dict[str, str]:
        """As parameters of a request."""
        found = {"labelSelector": self.labels, "fieldSelector": self.fields}
        return {name: value for name, value in found.items() if value}


class ApiServerSource:
    """Objects of one API server. All methods raise `ClusterError`s."""

    def __init__(
        self,
        configuration: kubernetes.client.Configuration,
        selectors: Mapping[Resource, Selectors],
        on_request: Callable[[str, str, str], None] = lambda verb, resource, code: None,
    ) -> None:
        self._configuration, self._selectors, self._on_request = configuration, selectors, on_request
        self._open: aiohttp.ClientSession | None = None

    async def list(self, resource: Resource, namespace: str | None, token: str) -> Page:
        """A part of the list of all objects."""
        query = self._query(resource) | {"limit": str(PAGE_SIZE)} | ({"continue": token} if token else {})
        async with self._get(
            "list", resource, namespace, query, aiohttp.ClientTimeout(total=60, sock_connect=5)
        ) as response:
            found = json.loads(await response.read())
        meta = found.get("metadata") or {}
        # entries of a list don't say what they are
        items = [{"apiVersion": resource.api_version, "kind": resource.kind, **item} for item in found["items"] or ()]
        return Page(items, meta.get("resourceVersion", ""), meta.get("continue") or "")

    async def watch(self, resource: Resource, namespace: str | None, version: str) -> AsyncIterator[Change]:
        """What changes after that version, until the API server ends the stream."""
        seconds = SILENT_WATCH_SECONDS if resource in SILENT else WATCH_SECONDS
        query = self._query(resource) | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            # watches that were begun together are not to end together
            "timeoutSeconds": str(round(seconds * random.uniform(1.0, 2.0))),
        }
        patience = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=INACTIVE_SECONDS)
        async with self._get("watch", resource, namespace, query, patience) as response:
            async for line in _lines(response.content):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    raise classify(int(status.get("code") or 500), json.dumps(status))
                yield Change(event["type"], event["object"])

    async def close(self) -> None:
        """Close all connections."""
        if self._open is not None:
            await self._open.close()

    def _query(self, resource: Resource) -> dict[str, str]:
        return self._selectors.get(resource, Selectors()).query()

    @asynccontextmanager
    async def _get(
        self,
        verb: str,
        resource: Resource,
        namespace: str | None,
        query: Mapping[str, str],
        patience: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response of a success; a `ClusterError` for anything else, even while it is read."""
        url, code = _url(self._configuration.host, resource, namespace), "none"
        try:
            options = await self._request_options()
            async with self._session().get(url, params=query, timeout=patience, **options) as response:
                code = str(response.status)
                self._on_request(verb, resource.plural, code)
                if response.status != 200:
                    text = await response.read()
                    raise classify(response.status, text, response.headers.get("Retry-After"))
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            if code == "none":
                self._on_request(verb, resource.plural, code)
            raise Transient(f"the API server can't be reached: {error or type(error).__name__}") from error

    def _session(self) -> aiohttp.ClientSession:
        """The connections, opened on first use."""
        if self._open is None:
            connector = aiohttp.TCPConnector(limit=0, ssl=_ssl_context(self._configuration))
            self._open = aiohttp.ClientSession(connector=connector, read_bufsize=2**18, trust_env=False)
        return self._open

    async def _request_options(self) -> dict[str, Any]:
        """Credentials, renewed where they are due, and the way to the server."""
        configuration = self._configuration
        # renewing may read a file or run a program
        token = await asyncio.to_thread(configuration.get_api_key_with_prefix, "BearerToken")
        headers = {"Accept": "application/json", "User-Agent": f"{keys.FIELD_MANAGER}/{__version__}"}
        options: dict[str, Any] = {"headers": headers}
        if token:
            headers["Authorization"] = token
        elif configuration.username:
            options["auth"] = aiohttp.BasicAuth(configuration.username, configuration.password or "")
        if configuration.proxy:
            options["proxy"] = configuration.proxy
        if configuration.tls_server_name:
            options["server_hostname"] = configuration.tls_server_name
        return options


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length, as they come."""
    parts: list[bytes] = []
    async for chunk in content.iter_any():
        head, *more = chunk.split(b"\n")
        parts.append(head)
        if not more:
            continue
        yield b"".join(parts)
        for line in more[:-1]:
            yield line
        parts = [more[-1]]
    if rest := b"".join(parts):
        yield rest


def _url(host: str, resource: Resource, namespace: str | None) -> str:
    root = f"/apis/{resource.group}/{resource.version}" if resource.group else f"/api/{resource.version}"
    scope = f"/namespaces/{namespace}" if namespace is not None else ""
    return f"{host.rstrip('/')}{root}{scope}/{resource.plural}"


def _ssl_context(configuration: kubernetes.client.Configuration) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    return context
