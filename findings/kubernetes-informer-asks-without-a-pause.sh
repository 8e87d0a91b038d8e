#!/usr/bin/env bash
# kubernetes 37.0.1, SharedInformer: a watch that is refused is asked for again at once, as often as the server answers.
#
# One would guess: the client's new informer backs off like Go's, whose reflector waits from 0.8 s up to half a minute. A failed
#   list does wait five seconds here.
# What happens: the loop around the watch has no pause of its own. Where the API server allows list but refuses watch (a Role with
#   one verb forgotten, or permissions changed while it runs), each refusal is followed by the next request.
# Seen: 45 requests in 2 s to a slow server that answers 403 (Go would have made three); the ERROR handler is called for each of them.
# What follows: sleep in an ERROR handler (it runs in the informer's own thread), or grant watch wherever you grant list.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet kubernetes==37.0.1
"$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import collections
import http.server
import json
import threading
import time
from urllib.parse import urlunsplit

from kubernetes import client
from kubernetes.informer import ERROR, SharedInformer

asked = collections.Counter()
EMPTY = {"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "9"}, "items": []}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        watch = "watch=" in self.path
        asked["watch" if watch else "list"] += 1
        refusal = {"kind": "Status", "code": 403, "reason": "Forbidden", "message": "may not watch"}
        text = json.dumps(refusal if watch else EMPTY).encode()
        self.send_response(403 if watch else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
configuration = client.Configuration()
configuration.host = urlunsplit(("http", f"127.0.0.1:{server.server_address[1]}", "", "", ""))
pods = client.CoreV1Api(client.ApiClient(configuration))
errors = []
informer = SharedInformer(pods.list_namespaced_pod, namespace="ml")
informer.add_event_handler(ERROR, errors.append)
informer.start()
time.sleep(2)
print(f"in 2 s: {asked['list']} list, {asked['watch']} refused watches, {len(errors)} errors told")
assert asked["list"] == 1, asked
assert asked["watch"] > 15, "the informer pauses by now"
informer.stop()
PYTHON
