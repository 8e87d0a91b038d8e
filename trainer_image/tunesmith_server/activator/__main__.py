"""`python3 -m tunesmith_server.activator`: the container of an activator pod.

SIGTERM: it is ready no longer, answers what still arrives, and ends when nothing is held or relayed any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

from aiohttp import web

from tunesmith_api import keys
from tunesmith_api.activation import ActivatorSettings
from tunesmith_server.activator.metrics import Metrics
from tunesmith_server.activator.relay import Relay
from tunesmith_server.front.apikeys import ApiKeys
from tunesmith_store.listen import listening_socket

__all__ = ["Activator", "main"]

log = logging.getLogger("tunesmith.activator")

# Services stop sending some moments after a pod is told to stop: new requests still come in that time
ENDPOINT_REMOVAL_SECONDS = 3.0
STOP_MARGIN_SECONDS = 3.0
LAST_ANSWERS_SECONDS = 0.5


class Activator:
    """Both ports of the pod: requests, and probes with metrics."""

    def __init__(self, settings: ActivatorSettings, api_keys: ApiKeys | None) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._relay = Relay(settings, self._metrics, api_keys)
        self._requests = web.Server(self._relay.answer, handler_cancellation=True, access_log=None)
        self._health = web.Server(self._probe, access_log=None)

    async def open(self, port: int = keys.PORT_SERVER, health_port: int = keys.PORT_HEALTH) -> tuple[int, int]:
        """Begin to listen on all addresses of the pod; return the ports in use."""
        await self._relay.open()
        loop, found = asyncio.get_running_loop(), []
        self._listeners = []
        for server, wanted in ((self._requests, port), (self._health, health_port)):
            listener = listening_socket(wanted)
            found.append(int(listener.getsockname()[1]))
            self._listeners.append(await loop.create_server(server, sock=listener, backlog=1024))
        return found[0], found[1]

    async def drain(self) -> None:
        """Answer new requests until Services know; then end with the last that is in flight, or when time is up."""
        self._relay.draining = True
        await asyncio.sleep(ENDPOINT_REMOVAL_SECONDS)
        self._listeners[0].close()
        left = self._settings.grace_seconds - ENDPOINT_REMOVAL_SECONDS - STOP_MARGIN_SECONDS
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left):
                await self._relay.idle()
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        for listener in self._listeners:
            listener.close()
        for server in (self._requests, self._health):
            await server.shutdown(LAST_ANSWERS_SECONDS)
        await self._relay.close()

    async def _probe(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == keys.PATH_METRICS:
            return web.Response(text=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})
        if self._relay.draining:
            return web.Response(status=503, text="stopping")
        return web.Response(text="ready")


async def _run(settings: ActivatorSettings) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    folder = Path(os.environ.get(keys.ENV_API_KEYS, keys.API_KEYS_DIRECTORY))
    activator = Activator(settings, ApiKeys(folder) if settings.asks_keys else None)
    await activator.open()
    log.info("holds requests for %s", settings.servers_url)
    await stop.wait()
    log.info("told to stop: finishing the requests in flight")
    await activator.drain()


def main() -> int:
    """Hold and relay until SIGTERM; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    asyncio.run(_run(ActivatorSettings.from_json(os.environ[keys.ENV_ACTIVATOR])))
    log.info("stopped")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
