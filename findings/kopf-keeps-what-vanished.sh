#!/usr/bin/env bash
# kopf 1.45.2, indexes: an object that is deleted while a watch has lost its place stays in the index for ever.
#
# One would guess: an index is what there is. After a 410 ("too old resource version", as after an API server's restart) kopf lists
#   anew, and what the new list lacks is dropped, as in Go's informers.
# What happens: the new list's objects are put in, and nothing is taken out: only a DELETED event does that, and the event for
#   what vanished in between never comes. on.event handlers aren't called for it either.
# Seen: the API server has no object, and has said so in a complete list; the index still has it seconds later.
# What follows: an operator that decides by such an index acts on ghosts: it makes children of an owner that is gone. Compare
#   with a list of your own after each relist, or keep the cache yourself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet kopf==1.45.2 aiohttp==3.14.5
"$work/venv/bin/python" - <<'PYTHON'
import asyncio
import json
from urllib.parse import urlunsplit

import kopf
from aiohttp import web

THING = {"apiVersion": "example.dev/v1", "kind": "Thing",
         "metadata": {"name": "ghost", "namespace": "ml", "uid": "u1", "resourceVersion": "5"}}
lists = []


VERSION = {"groupVersion": "example.dev/v1", "version": "v1"}
NAMES = {"singularName": "", "verbs": ["list", "watch", "patch"]}
DISCOVERY = {
    "/api": {"versions": ["v1"]},
    "/apis": {"groups": [{"name": "example.dev", "versions": [VERSION], "preferredVersion": VERSION}]},
    "/api/v1": {"resources": [{"name": "namespaces", "kind": "Namespace", "namespaced": False, **NAMES}]},
    "/apis/example.dev/v1": {"resources": [{"name": "things", "kind": "Thing", "namespaced": True, **NAMES}]},
}

async def answer(request):
    if request.path != "/apis/example.dev/v1/things":
        return web.json_response(DISCOVERY.get(request.path, {"resources": []}))
    if "watch" not in request.query:
        lists.append([] if lists else [THING])
        return web.json_response({"metadata": {"resourceVersion": "9"}, "items": lists[-1]})
    if len(lists) == 1:
        gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
        return web.Response(text=json.dumps({"type": "ERROR", "object": gone}) + "\n")
    await asyncio.sleep(60)


async def main():
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    registry, seen, stop = kopf.OperatorRegistry(), {}, asyncio.Event()
    server = urlunsplit(("http", f"127.0.0.1:{runner.addresses[0][1]}", "", "", ""))
    kopf.on.login(registry=registry)(lambda **_: kopf.ConnectionInfo(server=server))
    kopf.index("example.dev", "v1", "things", registry=registry, id="things")(lambda name, **_: {name: True})
    kopf.on.event("example.dev", "v1", "things", registry=registry)(lambda **_: None)

    @kopf.on.startup(registry=registry)
    async def startup(settings, things, **_):
        settings.posting.enabled, settings.scanning.disabled = False, True
        seen["index"] = things

    operator = asyncio.create_task(kopf.operator(registry=registry, standalone=True, clusterwide=True, stop_flag=stop))
    while len(lists) < 2:
        await asyncio.sleep(0.1)
    await asyncio.sleep(3)
    print(f"lists: {[len(items) for items in lists]} objects; the index has {list(seen['index'])}")
    assert [len(items) for items in lists] == [1, 0], lists
    assert list(seen["index"]) == ["ghost"], "kopf drops what a new list lacks by now"
    stop.set()
    await asyncio.wait_for(operator, 20)


asyncio.run(main())
PYTHON
