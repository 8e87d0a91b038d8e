"""Progress over HTTP, from pods that answer as they like: what is a report, what isn't, and how each is counted."""

import asyncio
import json
import zlib

import pytest
from aiohttp import web

from tunesmith_operator.adapters.progress import MAX_BYTES, MAX_METRICS_BYTES, ProgressClient

PATIENCE = 30.0
"""Seconds for an answer that comes at once, on a machine with much else to do."""
REPORT = {"globalStep": 5, "maxSteps": 10, "schemaVersion": 1}


class Pod:
    """Serves whatever `answer` makes of a request, on a port of its own."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    async def __aenter__(self):
        async def handle(request):
            self.asked.append(request)
            return await self.answer(request) if asyncio.iscoroutinefunction(self.answer) else self.answer(request)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        # one that still waits ends when its client leaves, and not after its time
        self.runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()


async def polled(port, times=1):
    counted = []
    client = ProgressClient(timeout_seconds=PATIENCE, on_poll=counted.append)
    try:
        for _ in range(times):
            report = await client.fetch("127.0.0.1", port)
    finally:
        await client.close()
    return report, counted[-1]


def text(body, **settings):
    return lambda request: web.Response(body=body if isinstance(body, bytes) else json.dumps(body).encode(), **settings)


@pytest.mark.parametrize("content_type", ["application/json", "text/html", "application/octet-stream"])
async def test_progress_is_read_whatever_its_type_is_called(content_type):
    async with Pod(text(REPORT, content_type=content_type)) as pod:
        report, result = await polled(pod.port)
    assert (report.global_step, result) == (5, "ok")
    assert [request.path for request in pod.asked] == ["/progress"]


async def in_pieces(request):
    response = web.StreamResponse()
    await response.prepare(request)
    document = json.dumps(REPORT).encode()
    for start in range(0, len(document), 7):
        await response.write(document[start : start + 7])
        await asyncio.sleep(0.01)
    return response


async def test_a_report_that_arrives_in_pieces_is_read_to_its_end():
    async with Pod(in_pieces) as pod:
        report, result = await polled(pod.port)
    assert (report.max_steps, result) == (10, "ok")


@pytest.mark.parametrize("body", [b"not json", {"schemaVersion": 99}, {"surprise": 1}, b"\xff", b"[" * 10_000, b""])
async def test_what_is_no_report_is_none(body):
    async with Pod(text(body)) as pod:
        assert await polled(pod.port) == (None, "invalid")


@pytest.mark.parametrize("status", [404, 503])
async def test_an_error_is_no_report(status):
    async with Pod(text(REPORT, status=status)) as pod:
        assert await polled(pod.port) == (None, "invalid")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed(status):
    async with Pod(text(REPORT)) as elsewhere:
        headers = {"Location": f"http://127.0.0.1:{elsewhere.port}/progress"}
        async with Pod(text(b"", status=status, headers=headers)) as pod:
            assert await polled(pod.port) == (None, "redirected")
    assert elsewhere.asked == []


async def endless(request):
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" " * 8192)


async def test_a_body_without_end_is_read_to_the_bound_only():
    async with Pod(endless) as pod:
        assert await polled(pod.port) == (None, "too_large"), "and not: timeout"


async def test_a_body_a_byte_too_long_is_no_report():
    document = json.dumps(REPORT).encode()
    async with Pod(text(document.ljust(MAX_BYTES))) as pod:
        assert (await polled(pod.port))[1] == "ok"
    async with Pod(text(document.ljust(MAX_BYTES + 1))) as pod:
        assert (await polled(pod.port))[1] == "too_large"


async def test_nothing_is_decompressed():
    small = zlib.compress(json.dumps(REPORT).encode())
    async with Pod(text(small, headers={"Content-Encoding": "deflate"})) as pod:
        assert await polled(pod.port) == (None, "invalid")
    assert pod.asked[0].headers["Accept-Encoding"] == "identity"


async def test_a_cookie_is_not_kept():
    async with Pod(text(REPORT, headers={"Set-Cookie": "a=b"})) as pod:
        await polled(pod.port, times=2)
    assert "Cookie" not in pod.asked[1].headers


async def silent(request):
    await asyncio.sleep(PATIENCE)


async def dripping(request):
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("answer", [silent, dripping])
async def test_a_pod_that_keeps_us_waiting_is_left(answer):
    counted = []
    client = ProgressClient(timeout_seconds=0.3, on_poll=counted.append)
    async with Pod(answer) as pod:
        with pytest.raises(TimeoutError):
            await client.fetch("127.0.0.1", pod.port)
        await client.close()
    assert counted == ["timeout"]


async def test_a_pod_that_is_not_there_is_unreachable():
    async with Pod(text(REPORT)) as pod:
        port = pod.port
    assert await polled(port) == (None, "unreachable")


async def counted(answer):
    """What the client makes of a server's metrics, and how the poll is counted."""
    results = []
    client = ProgressClient(timeout_seconds=PATIENCE, on_poll=results.append)
    async with Pod(answer) as pod:
        try:
            found = await client.figures("127.0.0.1", pod.port)
        finally:
            await client.close()
    assert [request.path for request in pod.asked] == ["/metrics"]
    return found, results[-1]


async def test_metrics_of_a_server_are_read_to_a_bound():
    line = b'http_requests_total{path="/v1/completions",code="500"} 3\n'
    found, result = await counted(text(line + b"\xff\n"))
    assert (found.requests, found.errors, result) == (3, 3, "ok")
    assert await counted(text(line * (MAX_METRICS_BYTES // len(line) + 1))) == (None, "too_large")
    assert await counted(text(b"", status=404)) == (None, "invalid")
    assert await counted(text(b"", status=302, headers={"Location": "/other"})) == (None, "redirected")
