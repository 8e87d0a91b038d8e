"""What servers are given follows from their artefact, on an in-memory cluster: where the spec says nothing, too little, or a status is lost."""

import pytest

from support import make
from support.begun import condition, edit
from support.world import World
from tunesmith_api.artifacts import ModelShape
from tunesmith_api.keys import MODELDEPLOYMENT_KIND, Reason
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport

SHAPE = ModelShape(kv_bytes_per_token=131072, heads=32, width=4096, feed_forward=14336, vocabulary=128256)
MADE = ModelRef(uri="s3://models/quantized/q8_0-abc", digest="a" * 64, size_bytes=8_540_000_000, shape=SHAPE)
NEEDED = 12179
"""MiB: 8145 of weights, 1024 of context, 575 of program and buffers, and a quarter of that."""


def quantized(world: World, revision: str = "r1") -> None:
    pod = world.pod(f"sentiment-{revision}-quantize")
    world.ends(pod, 0, TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=MADE))
    world.job_is(f"sentiment-{revision}-quantize", "Complete")
    world.reconcile()


def begun(**spec) -> World:
    world = World()
    world.cluster.put(make.modeldeployment(**spec))
    world.reconcile()
    quantized(world)
    return world


def memory_of(world: World, name: str = "sentiment-r1") -> str:
    pod = world.cluster.get("Deployment", name)["spec"]["template"]["spec"]
    return pod["containers"][0]["resources"]["limits"]["memory"]


def test_servers_are_given_what_their_artefact_needs_and_status_says_it():
    world = begun()
    (revision,) = world.status(MODELDEPLOYMENT_KIND)["revisions"]
    assert revision["memoryBytes"] == NEEDED << 20
    assert memory_of(world) == f"{NEEDED}Mi"
    job = world.cluster.get("Job", "sentiment-r1-quantize")["spec"]["template"]["spec"]
    assert job["containers"][0]["resources"]["limits"]["memory"] == "4Gi"


def test_too_little_memory_is_told_before_any_pod_is_started_and_more_of_it_helps():
    world = begun(resources={"memory": "8Gi"})
    assert world.cluster.get("Deployment", "sentiment-r1") is None
    status, reason, message = condition(world, "Ready")
    assert (status, reason) == ("False", "MemoryTooSmall")
    assert "spec.resources.memory is 8Gi" in message
    assert f"Set it to {NEEDED}Mi" in message
    assert condition(world, "ArtifactReady")[0] == "True"
    world.wait(60)
    assert world.cluster.get("Deployment", "sentiment-r1") is None
    edit(world, resources={"memory": "16Gi"})
    quantized(world, "r2")
    assert memory_of(world, "sentiment-r2") == "16Gi"


@pytest.mark.parametrize("pods_are_there", [True, False])
def test_servers_keep_what_they_were_given_when_the_status_is_lost(pods_are_there):
    world = begun()
    world.rolls_out("sentiment-r1")
    world.reconcile()
    if not pods_are_there:  # and with them the report that says what the artefact is made of
        for pod in world.cluster.of_kind("Pod"):
            world.cluster.remove("Pod", "ml", pod["metadata"]["name"])
    world.cluster.change(MODELDEPLOYMENT_KIND, "sentiment", {"status": None})
    world.reconcile()
    assert condition(world, "Ready")[0] == "True"
    assert memory_of(world) == f"{NEEDED}Mi"
    edit(world, replicas=2)
    assert world.cluster.get("Deployment", "sentiment-r1")["spec"]["replicas"] == 2
    assert memory_of(world) == f"{NEEDED}Mi"
