"""Lists and watches over HTTP, against a scripted server."""

import asyncio
import json

import kubernetes.client
import pytest
from aiohttp import web

from tunesmith_operator.adapters.errors import Expired, Gone, Rejected, Transient
from tunesmith_operator.adapters.watch import INACTIVE_SECONDS, PAGE_SIZE, ApiServerSource, Selectors
from tunesmith_operator.core.kubernetes.resources import EVENT, FINETUNEJOB, POD


def pod(name, version="5", **more):
    return {"metadata": {"name": name, "namespace": "ml", "resourceVersion": version}, **more}


class Server:
    """Answers as told; a list of bytes is sent as a stream, piece by piece."""

    def __init__(self):
        self.requests, self.status, self.answer, self.headers, self.hold = [], 200, {}, {}, None

    async def handle(self, request):
        self.requests.append(request)
        if not isinstance(self.answer, list):
            return web.json_response(self.answer, status=self.status, headers=self.headers)
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in self.answer:
            await response.write(piece)
            await asyncio.sleep(0.01)
        if self.hold == "reset":
            request.transport.abort()
        return response


@pytest.fixture
async def server():
    scripted = Server()
    app = web.Application()
    app.router.add_get("/{path:.*}", scripted.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    scripted.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield scripted
    await runner.cleanup()


@pytest.fixture
async def source(server):
    configuration = kubernetes.client.Configuration()
    configuration.host = server.url
    configuration.api_key["BearerToken"] = "Bearer secret"
    made = ApiServerSource(configuration, {POD: Selectors(labels="a=b", fields="c=d")})
    yield made
    await made.close()


async def test_a_list_is_asked_for_in_pages_with_selectors_and_credentials(server, source):
    server.answer = {"metadata": {"resourceVersion": "9", "continue": "more"}, "items": [pod("a")]}
    page = await source.list(POD, None, "")
    assert (page.version, page.token) == ("9", "more")
    assert page.items == [{"apiVersion": "v1", "kind": "Pod", **pod("a")}]
    await source.list(POD, "ml", page.token)
    first, second = server.requests
    assert (first.path, second.path) == ("/api/v1/pods", "/api/v1/namespaces/ml/pods")
    assert dict(first.query) == {"labelSelector": "a=b", "fieldSelector": "c=d", "limit": str(PAGE_SIZE)}
    assert second.query["continue"] == "more"
    assert first.headers["Authorization"] == "Bearer secret"


async def test_an_empty_list_has_no_items(server, source):
    server.answer = {"metadata": {"resourceVersion": "9"}, "items": None}
    assert (await source.list(FINETUNEJOB, None, "")).items == []
    assert server.requests[0].path == "/apis/tunesmith.dev/v1alpha1/finetunejobs"


async def test_events_come_whole_however_the_stream_is_cut(server, source):
    lines = [{"type": "ADDED", "object": pod("a", message="x" * 300_000)}, {"type": "BOOKMARK", "object": pod("", "8")}]
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    server.answer = [text[:10], text[10:200_000], text[200_000:-3], text[-3:]]
    found = [change async for change in source.watch(POD, None, "5")]
    assert [(it.type, it.object["metadata"]["resourceVersion"]) for it in found] == [("ADDED", "5"), ("BOOKMARK", "8")]
    assert len(found[0].object["message"]) == 300_000
    query = server.requests[0].query
    assert (query["resourceVersion"], query["watch"], query["allowWatchBookmarks"]) == ("5", "true", "true")
    assert 300 <= int(query["timeoutSeconds"]) <= 600


async def test_a_stream_without_bookmarks_ends_before_it_could_seem_dead(server, source):
    server.answer = []
    assert [it async for it in source.watch(EVENT, None, "1")] == []
    assert int(server.requests[0].query["timeoutSeconds"]) < INACTIVE_SECONDS - 10


async def test_an_expired_version_is_told_by_status_and_within_the_stream(server, source):
    server.answer = [b'{"type":"ERROR","object":{"code":410,"message":"too old"}}\n']
    with pytest.raises(Expired, match="too old"):
        [change async for change in source.watch(POD, None, "5")]
    server.answer, server.status = {"code": 410, "message": "expired token"}, 410
    with pytest.raises(Expired, match="expired token"):
        await source.list(POD, None, "token")


@pytest.mark.parametrize(
    ("status", "error"), [(403, Rejected), (404, Gone), (401, Transient), (500, Transient), (504, Transient)]
)
async def test_refusals_are_told_apart(server, source, status, error):
    server.answer, server.status = {"message": "no"}, status
    with pytest.raises(error):
        await source.list(POD, None, "")
    with pytest.raises(error):
        [change async for change in source.watch(POD, None, "5")]


async def test_the_patience_that_is_asked_for_is_known(server, source):
    server.answer, server.status, server.headers = {"message": "busy"}, 429, {"Retry-After": "7"}
    with pytest.raises(Transient) as refused:
        await source.list(POD, None, "")
    assert refused.value.retry_after == 7.0


async def test_a_connection_that_breaks_is_transient_and_keeps_what_came(server, source):
    server.answer, server.hold = [b'{"type":"ADDED","object":{"metadata":{}}}\n', b'{"type":"ADD'], "reset"
    stream = source.watch(POD, None, "5")
    assert (await anext(stream)).type == "ADDED"
    with pytest.raises(Transient, match="can't be reached"):
        await anext(stream)


async def test_nobody_there_is_transient():
    configuration = kubernetes.client.Configuration()
    configuration.host = "http://127.0.0.1:9"
    nobody = ApiServerSource(configuration, {})
    try:
        with pytest.raises(Transient, match="can't be reached"):
            await nobody.list(POD, None, "")
    finally:
        await nobody.close()
