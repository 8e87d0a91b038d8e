"""The Kubernetes client against a scripted HTTP server: what goes over the wire, and what errors become."""

import asyncio
import http.server
import json
import threading
import urllib.parse

import kubernetes.client
import pytest

from support import make
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_operator.adapters.errors import AlreadyExists, Gone, Invalid, Rejected, Transient, classify
from tunesmith_operator.adapters.events import EventRecorder
from tunesmith_operator.adapters.kube import KubernetesCluster
from tunesmith_operator.core.finetunejob.children import build
from tunesmith_operator.core.kubernetes.resources import FINETUNEJOB, JOB, SECRET, Key
from tunesmith_operator.core.status.transitions import EventNote


class Server:
    """Answers every request alike and keeps what was asked."""

    def __init__(self):
        self.requests, self.code, self.answer, self.headers = [], 200, {}, {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_any(self):
                parts = urllib.parse.urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append(
                    (self.command, parts.path, dict(urllib.parse.parse_qsl(parts.query)), self.headers, body)
                )
                text = outer.answer if isinstance(outer.answer, bytes) else json.dumps(outer.answer).encode()
                self.send_response(outer.code)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PATCH = do_DELETE = handle_any

            def log_message(self, format, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def port(self):
        return self.http.server_address[1]

    def body(self):
        return json.loads(self.requests[-1][4])


@pytest.fixture
def server():
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def kube(server):
    configuration = kubernetes.client.Configuration(host=f"http://127.0.0.1:{server.port}")
    configuration.api_key["BearerToken"] = "bearer t0ken"
    client = KubernetesCluster(configuration, threads=1)
    yield client
    client.close()


def manifest():
    return build(FineTuneJob.model_validate(make.finetunejob()), make.CONFIG, 1).job


async def test_a_child_is_posted_under_our_name(server, kube):
    server.answer = {"metadata": {"name": "sentiment-1"}}
    assert await kube.create(JOB, "ml", manifest().body) == server.answer
    method, path, query, headers, _ = server.requests[-1]
    assert (method, path) == ("POST", "/apis/batch/v1/namespaces/ml/jobs")
    assert query == {"fieldManager": "tunesmith-operator"}
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "bearer t0ken"
    assert headers["User-Agent"].startswith("tunesmith-operator/")
    assert server.body() == manifest().body


async def test_one_object_is_found_by_the_right_to_list(server, kube):
    server.answer = {"items": [{"metadata": {"name": "sentiment-1"}}]}
    assert await kube.find(JOB, "ml", "sentiment-1") == server.answer["items"][0]
    assert server.requests[-1][:3] == (
        "GET", "/apis/batch/v1/namespaces/ml/jobs", {"fieldSelector": "metadata.name=sentiment-1"},
    )  # fmt: skip
    server.answer = {"items": []}
    assert await kube.find(JOB, "ml", "sentiment-1") is None


async def test_status_goes_to_its_subresource_with_uid_and_version(server, kube):
    await kube.apply_status(FINETUNEJOB, "ml", "sentiment", "u1", "7", {"phase": "Training"})
    method, path, query, _, _ = server.requests[-1]
    assert (method, path) == ("PATCH", "/apis/tunesmith.dev/v1alpha1/namespaces/ml/finetunejobs/sentiment/status")
    assert query["force"] == "true"
    assert server.body()["metadata"] == {
        "name": "sentiment", "namespace": "ml", "uid": "u1", "resourceVersion": "7",
    }  # fmt: skip
    assert server.body()["status"] == {"phase": "Training"}


async def test_a_patch_is_a_merge_patch_of_that_very_object(server, kube):
    await kube.patch(JOB, "ml", "sentiment-1", "u1", {"spec": {"suspend": True}, "metadata": {"labels": {"a": "b"}}})
    assert server.requests[-1][3]["Content-Type"] == "application/merge-patch+json"
    assert server.body() == {"spec": {"suspend": True}, "metadata": {"labels": {"a": "b"}, "uid": "u1"}}


async def test_creating_what_exists_is_told_and_any_other_conflict_is_not_taken_for_it(server, kube):
    server.code, server.answer = 409, {"reason": "AlreadyExists", "message": "there is one"}
    with pytest.raises(AlreadyExists):
        await kube.create(SECRET, "ml", {"metadata": {"name": "x"}})
    assert server.requests[-1][:2] == ("POST", "/api/v1/namespaces/ml/secrets")
    server.answer = {"reason": "Conflict", "message": 'Operation cannot be fulfilled on resourcequotas "q"'}
    with pytest.raises(Transient):
        await kube.create(SECRET, "ml", {"metadata": {"name": "x"}})


async def test_the_same_event_twice_is_one(server, kube):
    server.code, server.answer = 409, {"reason": "AlreadyExists"}
    note = EventNote("Normal", "Training", "x")
    await EventRecorder(kube, "pod-1").record(FINETUNEJOB, Key("FineTuneJob", "ml", "a"), "u1", note, make.at(0))


async def test_deleting_what_is_gone_is_fine(server, kube):
    server.code = 404
    await kube.delete(JOB, "ml", "sentiment-1", "u1")
    assert server.body() == {"propagationPolicy": "Background", "preconditions": {"uid": "u1"}}


async def test_a_refusal_is_told_in_the_servers_words(server, kube):
    server.code, server.answer = 403, {"message": "exceeded quota", "reason": "Forbidden"}
    with pytest.raises(Rejected, match="exceeded quota"):
        await kube.create(JOB, "ml", manifest().body)


async def test_an_unreachable_server_is_transient(server, kube):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(Transient, match="can't be reached"):
        await kube.patch(JOB, "ml", "x", "u1", {})


async def test_requests_are_counted_by_the_code_of_their_answer_and_never_repeated_by_the_client(server):
    counted = []
    configuration = kubernetes.client.Configuration(host=f"http://127.0.0.1:{server.port}")
    client = KubernetesCluster(configuration, threads=1, on_request=lambda *found: counted.append(found))
    server.code, server.headers = 429, {"Retry-After": "60"}
    with pytest.raises(Transient) as caught:
        await asyncio.wait_for(client.delete(JOB, "ml", "x", "u1"), 30)
    assert caught.value.retry_after == 60
    assert len(server.requests) == 1
    server.code, server.headers = 302, {"Location": f"http://127.0.0.1:{server.port}/elsewhere"}
    with pytest.raises(Rejected):
        await client.patch(JOB, "ml", "x", "u1", {})
    server.code, server.headers = 409, {}
    with pytest.raises(Transient):
        await client.create(SECRET, "ml", {"metadata": {"name": "x"}})
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(Transient):
        await client.patch(JOB, "ml", "x", "u1", {})
    client.close()
    assert counted == [
        ("delete", "jobs", "429"), ("patch", "jobs", "302"), ("create", "secrets", "409"), ("patch", "jobs", "none"),
    ]  # fmt: skip
    assert {path for _, path, *_ in server.requests} & {"/elsewhere"} == set()


async def test_an_event_names_its_object_reason_and_reporter(server, kube):
    note = EventNote("Warning", "Diverged", "x" * 2000)
    await EventRecorder(kube, "pod-1").record(
        FINETUNEJOB, Key("FineTuneJob", "ml", "sentiment"), "u1", note, make.at(0)
    )
    body = server.body()
    assert server.requests[-1][1] == "/apis/events.k8s.io/v1/namespaces/ml/events"
    assert (body["type"], body["reason"], body["reportingInstance"]) == ("Warning", "Diverged", "pod-1")
    assert body["regarding"]["uid"] == "u1"
    assert len(body["note"]) <= 1024


TERMINATING = {
    "message": "terminating",
    "reason": "Forbidden",
    "details": {"causes": [{"reason": "NamespaceTerminating"}]},
}
ANOTHER = {
    "message": "field is immutable",
    "reason": "Invalid",
    "details": {"causes": [{"reason": "FieldValueInvalid", "field": "metadata.uid"}]},
}


@pytest.mark.parametrize(
    ("code", "answer", "kind"),
    [
        (404, {"message": "not found"}, Gone),
        (403, TERMINATING, Gone),
        (403, {"message": "no"}, Rejected),
        (422, {"message": "immutable"}, Invalid),
        (422, ANOTHER, Gone),
        (409, {"message": "there is one", "reason": "AlreadyExists"}, AlreadyExists),
        (409, {"message": "object has been modified", "reason": "Conflict"}, Transient),
        (429, {}, Transient),
        (500, b"no JSON", Transient),
        (401, {"message": "Unauthorized"}, Transient),
    ],
)
def test_errors_are_of_four_kinds(code, answer, kind):
    error = classify(code, answer if isinstance(answer, bytes) else json.dumps(answer))
    assert type(error) is kind


def test_the_servers_patience_is_kept():
    assert classify(429, b"{}", "7").retry_after == 7
    assert classify(503, b"{}", "Wed, 21 Oct").retry_after is None
