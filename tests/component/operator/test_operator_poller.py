"""Many pods polled over real sockets: whatever some of them do, the others are heard."""

import asyncio
import contextlib
import time

from support import make
from tunesmith_api.reports import ProgressReport
from tunesmith_operator.adapters.progress import ProgressClient
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.reconcile.progress import PollTarget
from tunesmith_operator.engine.poller import Poller

INTERVAL = 1.5


class Pods:
    """A port whose clients are answered, and one that accepts and stays silent; `open` counts the latter's clients."""

    def __init__(self):
        self.open = self.most_open = self.asked_in_vain = 0

    async def __aenter__(self):
        self.steps = 0
        self.healthy = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.silent = await asyncio.start_server(self._hold, "127.0.0.1", 0, backlog=500)
        return self

    async def __aexit__(self, *_):
        self.healthy.close()
        self.silent.close()

    async def _answer(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        self.steps += 1  # each answer is news
        body = ProgressReport(global_step=self.steps, heartbeat_unix=self.steps).to_json().encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    async def _hold(self, reader, writer):
        self.open += 1
        self.asked_in_vain += 1
        self.most_open = max(self.most_open, self.open)
        with contextlib.suppress(ConnectionError):
            await reader.read()  # the request
            await reader.read()  # until the client gives up
        self.open -= 1
        writer.close()

    def port(self, server):
        return server.sockets[0].getsockname()[1]


def target(name, port):
    return PollTarget(f"uid-{name}", "127.0.0.1", port)


def key(name):
    return Key("FineTuneJob", "ml", name)


async def test_silent_pods_keep_none_of_the_others_from_being_heard():
    heard = {}

    def news(key, moved):
        heard.setdefault(key.name, []).append(time.monotonic() - began)

    client = ProgressClient()
    poller = Poller(client.fetch, make.at, INTERVAL)
    async with Pods() as pods:
        for number in range(64):
            poller.follow(key(f"silent-{number}"), target(f"silent-{number}", pods.port(pods.silent)))
        for number in range(200):
            poller.follow(key(f"healthy-{number}"), target(f"healthy-{number}", pods.port(pods.healthy)))
        began = time.monotonic()
        running = asyncio.create_task(poller.run(news))
        await asyncio.sleep(12)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()
    assert len(heard) == 200
    assert max(moments[0] for moments in heard.values()) < 6, "two rounds of time-outs of the silent ones, and no more"
    fewest = min(sum(moment > 6 for moment in moments) for moments in heard.values())
    assert fewest >= 3, "every 1.5 s, as asked for, although 64 pods are silent"
    assert pods.most_open <= 32, "half of the connections"
    assert pods.asked_in_vain <= 64 * 4, "those who never answer are asked less and less often"
