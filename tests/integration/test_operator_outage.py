"""The API server restarted while objects come and go, and two operators of which one is killed: on a real control plane.

Each test has one of its own: what it does to it would fail the others.
"""

import contextlib
import json
import time
from collections import Counter
from datetime import UTC, datetime

import pytest

from support import make
from support.cuttable import CuttableRelay
from support.fakekubelet import FakeKubelet, container_of, ended, running
from support.operatorprocess import AGENTS, WRITES, OperatorProcess
from support.stage import Stage
from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport

ARTIFACT = ModelRef(uri="s3://models/sentiment/quantized/q8_0-abc", digest="a" * 64, size_bytes=7)
QUANTIZED = TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=ARTIFACT)
HOME = "tunesmith-system"
FAILOVER_SECONDS = 20.0


@pytest.fixture
def kubelet(own_plane):
    node = FakeKubelet(own_plane, running)
    yield node
    node.close()


@contextlib.contextmanager
def stage_of(plane, operator, kubelet):
    plane.kubectl("create", "namespace", "ml")
    try:
        yield Stage(plane, operator, kubelet, "ml")
    finally:
        operator.stop()


def job(name):
    return make.finetunejob(
        name, checkpoint={"uri": f"s3://checkpoints/{name}"}, output={"uri": f"s3://models/{name}"}, storage={}
    )


def names(stage, kind):
    return {item["metadata"]["name"] for item in stage.items(kind)}


def answers(plane, since):
    """(verb, resource, name, status code) of every write of the operator since then."""
    found = []
    for event in plane.audit_events(since):
        target = event.get("objectRef", {})
        if event["verb"] in WRITES and event.get("userAgent", "").startswith(AGENTS):
            code = event.get("responseStatus", {}).get("code", 0)
            found.append((event["verb"], target.get("resource", ""), target.get("name", ""), code))
    return found


def test_an_api_server_restarted_while_objects_come_and_go_leaves_no_ghost(own_plane, kubelet, tmp_path):
    config = json.loads(own_plane.kubectl("config", "view", "--raw", "-o", "json"))
    server = config["clusters"][0]["cluster"]["server"]
    relay = CuttableRelay(int(server.rpartition(":")[2]))
    config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{relay.port}"
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    operator = OperatorProcess(own_plane, tmp_path / "log", KUBECONFIG=str(tmp_path / "kubeconfig"))
    with stage_of(own_plane, operator, kubelet) as stage:
        stage.apply(*(job(f"job-{number}") for number in range(20)))
        stage.wait("all Jobs", lambda: len(names(stage, "jobs")) == 20)
        stage.wait("all statuses", lambda: all("attempts" in it["status"] for it in stage.items("ftj")))
        relay.cut()
        deleted = [f"job-{number}" for number in range(8)]
        stage.kubectl("delete", "ftj", *deleted)
        stage.kubectl("delete", "job", "job-8-1", "job-9-1", "--wait=false")
        stage.apply(*(job(f"late-{number}") for number in range(5)))
        own_plane.restart_api_server()
        stage.wait("the garbage collector", lambda: not names(stage, "jobs") & {f"{name}-1" for name in deleted})
        assert "{" in operator.health(), "an API server that is away is no reason to be restarted"
        mended = datetime.now(UTC)
        relay.mend()
        expected = {f"job-{number}-1" for number in range(8, 20)} | {f"late-{number}-1" for number in range(5)}
        stage.wait("the new and the lost Jobs", lambda: names(stage, "jobs") == expected, 60)
        time.sleep(30)
        assert names(stage, "jobs") == expected
        written = answers(own_plane, mended)
        ghosts = [it for it in written if it[2].removesuffix("-1").removesuffix("-workers") in deleted]
        assert not ghosts
        assert operator.process.poll() is None
        health = json.loads(operator.health())["operator"]
        assert health["lost"] == 0


class Pair:
    """Two operators that agree by a Lease."""

    def __init__(self, plane, folder):
        plane.kubectl("create", "namespace", HOME)
        self.plane = plane
        more = {"TUNESMITH_LEASE_NAME": "tunesmith", "TUNESMITH_OPERATOR_NAMESPACE": HOME}
        self.members = [OperatorProcess(plane, folder / f"log-{number}", **more) for number in (1, 2)]

    def log(self):
        return "\n".join(it.log() for it in self.members)

    def lease(self):
        return self.plane.get("lease", "tunesmith", HOME)["spec"]

    def leads(self):
        return [it for it in self.members if '"watches"' in it.health()]

    def kill_leader(self):
        """SIGKILL; returns the seconds until the other leads. The killed one starts again and stands by."""
        before = self.lease()["holderIdentity"]
        (leader,) = self.leads()
        leader.kill()
        began = time.monotonic()
        while self.lease()["holderIdentity"] == before:
            assert time.monotonic() - began < FAILOVER_SECONDS, self.log()
            time.sleep(0.2)
        took = time.monotonic() - began
        leader.start()
        return took

    def stop(self):
        for member in self.members:
            if member.process.poll() is None:
                member.stop()


def healthy(pod):
    name = container_of(pod)["name"]
    return ended(pod, 0, QUANTIZED) if name == keys.QUANTIZE_CONTAINER else running(pod)


def finishing(pod):
    trains = container_of(pod)["name"] == keys.TRAINER_CONTAINER
    return ended(pod, 0, make.succeeded()) if trains else healthy(pod)


def test_of_two_operators_one_acts_and_a_killed_one_is_followed(own_plane, kubelet, tmp_path, record_property):
    with stage_of(own_plane, Pair(own_plane, tmp_path), kubelet) as stage:
        pair = stage.operator
        stage.wait("a leader", pair.leads)
        assert len(pair.leads()) == 1
        stage.apply(job("sentiment"))
        stage.wait(
            "training", lambda: stage.get("ftj", "sentiment").get("status", {}).get("workers", {}).get("ready") == 2
        )
        in_training = pair.kill_leader()
        kubelet.script = finishing
        stage.wait_condition("ftj", "sentiment", "Succeeded", "True", "Completed", 60)
        status = stage.get("ftj", "sentiment")["status"]
        assert (status["restarts"], len(status["attempts"])) == (0, 1)

        kubelet.script = healthy
        stage.apply(make.modeldeployment("sentiment"))
        stage.wait("the rollout", lambda: stage.get("deployment", "sentiment-r1"))
        in_rollout = pair.kill_leader()
        stage.wait_condition("mdep", "sentiment", "Ready", "True", "ReplicasAvailable", 60)

        writes = answers(own_plane, None)
        made = Counter(it[1:3] for it in writes if it[0] == "create" and it[1] != "events" and 200 <= it[3] < 300)
        assert set(made.values()) == {1}, "no object is made twice"
        assert not [it for it in writes if it[3] == 409 and it[1] != "leases"], "nobody is in the other's way"
        record_property("failover_seconds", [round(in_training, 1), round(in_rollout, 1)])
        assert pair.lease()["leaseTransitions"] == 2
        (leader,) = pair.leads()
        assert leader.stop() == 0
        began = time.monotonic()
        stage.wait("the other, at once", lambda: len(pair.leads()) == 1, 8)
        record_property("handover_seconds", round(time.monotonic() - began, 1))
