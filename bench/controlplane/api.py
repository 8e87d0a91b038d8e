"""A small asyncio client of the API server: calls, and lists that stay true by watching. Used by all of bench.controlplane.

The official client is synchronous and copies every object several times; at 10,000 pods the load must not weigh more
than what is measured.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

__all__ = ["Api", "Refused"]

JSON = dict[str, Any]
OnEvent = Callable[[str, JSON], None]
PAGE = 500
RETRIES = 5


class Refused(Exception):
    """The API server said no; `status` is its HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:300]}")
        self.status = status


class Api:
    """One identity's connection; an async context manager. The kubeconfig is one that `stage` wrote: JSON, a token."""

    def __init__(self, kubeconfig: Path, connections: int = 32) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self._server = cluster["server"]
        self._headers = {"Authorization": f"Bearer {user['token']}", "Accept": "application/json"}
        self._tls = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        self._connections = connections

    async def __aenter__(self) -> Api:
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._headers, timeout=aiohttp.ClientTimeout(total=None, sock_connect=10)
        )
        self._slots = asyncio.Semaphore(self._connections)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> JSON:
        """One request; its answer.

        Raises:
            Refused: the API server said no; 429 and 5xx were tried again a few times.
        """
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(RETRIES):
            async with self._slots:
                try:
                    async with self._session.request(
                        method, self._server + path, data=data, headers={"Content-Type": kind}
                    ) as answer:
                        text = await answer.read()
                        if answer.status < 300:
                            return json.loads(text) if text else {}
                        status = answer.status
                except aiohttp.ClientError as error:
                    status, text = 503, str(error).encode()
            if status != 429 and status < 500:
                break
            await asyncio.sleep(0.2 * 2**attempt)
        raise Refused(status, text.decode(errors="replace"))

    async def create(self, path: str, body: JSON) -> JSON:
        """POST."""
        return await self.call("POST", path, body)

    async def merge(self, path: str, body: JSON) -> JSON:
        """Merge patch."""
        return await self.call("PATCH", path, body, "application/merge-patch+json")

    async def follow(self, path: str, on_event: OnEvent) -> None:
        """List, then watch, for ever.

        `on_event` gets ADDED, MODIFIED or DELETED and the object; after a relist, what is there is told again as ADDED.
        """
        joint = "&" if "?" in path else "?"
        while True:
            version = await self._list(path, joint, on_event)
            try:
                while version:
                    version = await self._watch(f"{path}{joint}watch=1&allowWatchBookmarks=true", version, on_event)
            except (aiohttp.ClientError, OSError):
                await asyncio.sleep(0.2)

    async def _list(self, path: str, joint: str, on_event: OnEvent) -> str:
        more = ""
        while True:
            page = await self.call("GET", f"{path}{joint}limit={PAGE}{more}")
            for item in page["items"]:
                on_event("ADDED", item)
            if not page["metadata"].get("continue"):
                return str(page["metadata"]["resourceVersion"])
            more = f"&continue={page['metadata']['continue']}"

    async def _watch(self, path: str, version: str, on_event: OnEvent) -> str:
        """Deliver until the stream ends; return where to go on, or nothing where only a new list helps."""
        async with self._session.get(f"{self._server}{path}&resourceVersion={version}") as answer:
            if answer.status != 200:
                return ""
            rest = b""
            async for chunk in answer.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        return ""
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        on_event(event["type"], event["object"])
        return version
