"""The activator with real servers behind it: who waits is answered, within bounds, and nobody without a key waits."""

import asyncio

import aiohttp
import pytest
from aiohttp import web

from tunesmith_api.activation import ActivatorSettings
from tunesmith_server.activator.__main__ import Activator
from tunesmith_server.front.apikeys import ApiKeys
from tunesmith_store.listen import listening_socket

PATH = "/v1/chat/completions"


class Stage:
    """An activator, a client, and a server that comes when it is told to."""

    def __init__(self, folder=None, **settings):
        listener = listening_socket(0)
        self.port = listener.getsockname()[1]
        listener.close()
        defaults = {
            "most_requests": 8,
            "most_bytes": 4096,
            "max_body_bytes": 2048,
            "hold_seconds": 60,
            "grace_seconds": 20,
        }
        settings = {"servers_url": f"http://127.0.0.1:{self.port}", **defaults, **settings}
        keys = ApiKeys(folder) if folder is not None else None
        self.activator = Activator(ActivatorSettings(asks_keys=folder is not None, **settings), keys)
        self.server, self.seen, self.more = None, [], asyncio.Event()

    async def __aenter__(self):
        port, health = await self.activator.open(0, 0)
        self.url, self.metrics_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{health}/metrics"
        self.client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
        return self

    async def __aexit__(self, *_):
        await self.client.close()
        await self.activator.close()
        if self.server is not None:
            self.server.close()

    async def begin(self):
        handler = web.Server(self._answer, access_log=None)
        self.server = await asyncio.get_running_loop().create_server(handler, "127.0.0.1", self.port)

    async def _answer(self, request):
        if request.path == "/health":
            return web.Response()
        body = await request.read()
        self.seen.append((request.method, request.path_qs, request.headers.get("Authorization"), body))
        if b"stream" not in body:
            return web.Response(body=b"answer to " + body, status=201, headers={"X-Server": "one"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: first\n\n")
        await self.more.wait()
        if b"breaks" in body:
            request.transport.abort()
        else:
            await response.write(b"data: second\n\n")
        return response

    def ask(self, body=b"hello", key=None, path=PATH):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return asyncio.create_task(self._ask(body, headers, path))

    async def _ask(self, body, headers, path):
        async with self.client.post(self.url + path, data=body, headers=headers) as response:
            return response.status, dict(response.headers), await response.read()

    async def held(self):
        async with self.client.get(self.metrics_url) as response:
            text = await response.text()
        return int(float(text.split("\ntunesmith_activator_requests_held ")[1].split()[0]))

    async def until_held(self, count):
        for _ in range(1500):
            if await self.held() == count:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{await self.held()} requests are held, not {count}")


async def test_requests_wait_for_the_first_server_and_get_its_answers():
    async with Stage() as stage:
        asked = [stage.ask(b"%d" % number, key="k", path=f"{PATH}?n={number}") for number in range(5)]
        await stage.until_held(5)
        await stage.begin()
        answers = await asyncio.gather(*asked)
        assert [(status, body) for status, _, body in answers] == [(201, b"answer to %d" % it) for it in range(5)]
        assert answers[0][1]["X-Server"] == "one"
        assert sorted(stage.seen)[3] == ("POST", f"{PATH}?n=3", "Bearer k", b"3")
        assert await stage.held() == 0
        assert (await stage.ask())[0] == 201, "whoever still comes here is handed on at once"


async def test_an_answer_comes_word_by_word_and_breaks_off_where_the_servers_does():
    async with Stage() as stage:
        await stage.begin()
        async with stage.client.post(stage.url + PATH, data=b"stream") as response:
            assert await response.content.readuntil(b"\n\n") == b"data: first\n\n"
            stage.more.set()
            assert await response.content.read() == b"data: second\n\n"
        async with stage.client.post(stage.url + PATH, data=b"stream that breaks") as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.content.read()


async def test_nobody_without_a_key_is_held(tmp_path):
    (tmp_path / "alice").write_text("secret")
    async with Stage(tmp_path) as stage:
        for key in (None, "wrong"):
            status, headers, body = await stage.ask(key=key)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert b'"error"' in body
        assert await stage.held() == 0
        waits = stage.ask(key="secret")
        await stage.until_held(1)
        await stage.begin()
        assert (await waits)[0] == 201


async def test_it_leads_to_its_servers_and_nowhere_else():
    async with Stage() as stage:
        await stage.begin()
        for target in ("http://127.0.0.2/v1/models", "*"):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(stage.url.rpartition(":")[2]))
            writer.write(f"OPTIONS {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert (await reader.read()).startswith(b"HTTP/1.1 400")
            writer.close()
        assert stage.seen == []


async def test_beyond_its_bounds_requests_are_refused_in_words():
    async with Stage(most_requests=3) as stage:
        large = stage.ask(b"x" * 2000)
        await stage.until_held(1)
        assert (await stage.ask(b"x" * 2049))[0] == 413
        others = [stage.ask(b"x" * 1000), stage.ask(b"x" * 1000)]
        await stage.until_held(3)
        status, headers, body = await stage.ask()
        assert (status, headers["Retry-After"]) == (503, "5")
        assert b"3 requests wait already" in body
        others[0].cancel()
        await stage.until_held(2)
        status, headers, body = await stage.ask(b"x" * 2000)
        assert (status, headers["Retry-After"]) == (503, "5")
        assert b"too large" in body
        await stage.begin()
        assert [it[0] for it in await asyncio.gather(large, others[1])] == [201, 201]


async def test_who_has_waited_too_long_is_told_so_and_asked_to_come_again():
    async with Stage(hold_seconds=1) as stage:
        status, headers, body = await stage.ask()
        assert (status, headers["Retry-After"]) == (503, "5")
        assert b"did not answer within 1 s" in body


async def test_one_that_is_told_to_stop_finishes_what_it_holds():
    async with Stage() as stage:
        async with stage.client.get(stage.metrics_url.replace("metrics", "healthz")) as response:
            assert response.status == 200
        waits = stage.ask()
        await stage.until_held(1)
        ends = asyncio.create_task(stage.activator.drain())
        await asyncio.sleep(0)
        async with stage.client.get(stage.metrics_url.replace("metrics", "healthz")) as response:
            assert response.status == 503
        late = stage.ask()
        await stage.until_held(2)
        await stage.begin()
        assert [it[0] for it in await asyncio.gather(waits, late)] == [201, 201]
        await ends
        with pytest.raises(aiohttp.ClientConnectorError):
            await stage.ask()
