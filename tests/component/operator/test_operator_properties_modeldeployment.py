"""Whatever happens to a deployment, in whatever order: it comes to rest, and what has answered once goes on answering."""

import logging

from hypothesis import given, settings
from hypothesis import strategies as st

from support import make
from support.world import World
from tunesmith_api.keys import MODELDEPLOYMENT_KIND, Reason
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.modeldeployment.decide import decide

KIND = MODELDEPLOYMENT_KIND
KEY = Key(KIND, "ml", "sentiment")
ARTIFACT = ModelRef(uri="s3://models/sentiment/quantized/q8_0-abc", digest="a" * 64, size_bytes=7)


def latest(world, kind, suffix=""):
    name = f"{world.status(KIND).get('latestRevision', '')}{suffix}"
    raw = world.cluster.get(kind, name)
    return name if raw is not None else None


def quantizes(world):
    if (job := latest(world, "Job", "-quantize")) and not world.cluster.get("Job", job).get("status"):
        world.ends(
            world.pod(job), 0, TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=ARTIFACT)
        )
        world.job_is(job, "Complete")


def quantization_fails(world):
    if (job := latest(world, "Job", "-quantize")) and not world.cluster.get("Job", job).get("status"):
        world.ends(world.pod(job), 41, make.failed(Reason.STORAGE_UNWRITABLE))
        world.job_is(job, "Failed", "PodFailurePolicy")


def quantizer_cannot_start(world):
    if job := latest(world, "Job", "-quantize"):
        waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "nope"}}
        world.pod(job, phase="Pending", containerStatuses=[{"name": "quantize", "image": "x", "state": waiting}])


def rolls_out(world):
    if name := latest(world, "Deployment"):
        world.rolls_out(name)


def answers_in_part(world):
    if name := latest(world, "Deployment"):
        world.rolls_out(name, available=0)


def misses_its_deadline(world):
    if name := latest(world, "Deployment"):
        late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
        world.cluster.change("Deployment", name, {"status": {"availableReplicas": 0, "conditions": [late]}})


def pods_are_refused(world):
    if name := latest(world, "Deployment"):
        refused = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}
        world.cluster.change("Deployment", name, {"status": {"conditions": [refused]}})


def server_crashes(world):
    if name := latest(world, "Deployment"):
        labels = world.cluster.get("Deployment", name)["spec"]["template"]["metadata"]["labels"]
        ended = {"exitCode": 1, "message": "out of luck", "reason": "Error"}
        entry = {
            "name": "server",
            "image": "i",
            "restartCount": 3,
            "lastState": {"terminated": ended},
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        }
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": world.stamp()}
        status = {"phase": "Running", "conditions": [scheduled], "containerStatuses": [entry]}
        world.cluster.put(
            {"kind": "Pod", "metadata": {"name": f"{name}-p", "namespace": "ml", "labels": labels}, "status": status}
        )


def edits(**spec):
    def edit(world):
        world.cluster.change(KIND, "sentiment", {"spec": spec})

    edit.__name__ = f"edit_{'_'.join(spec)}"
    return edit


def loses(kind, suffix=""):
    def lose(world):
        if name := latest(world, kind, suffix):
            world.cluster.remove(kind, "ml", name)

    lose.__name__ = f"lose_{kind}"
    return lose


def service_is_deleted(world):
    world.cluster.remove("Service", "ml", "sentiment")


def status_is_lost(world):
    raw = world.cluster.get(KIND, "sentiment")
    world.cluster.put({name: value for name, value in raw.items() if name != "status"})


def crash_soon(world):
    world.cluster.crash_after = len(world.cluster.writes) + 1


def time_passes(world):
    world.wait(31)


HAPPENINGS = [
    quantizes, quantization_fails, quantizer_cannot_start, rolls_out, answers_in_part, misses_its_deadline, pods_are_refused, server_crashes,
    edits(resources={"memory": "8Gi"}), edits(image="localhost/other:1"), edits(replicas=3), edits(replicas=0),
    edits(engine={"contextLength": 1_048_576, "parallelRequests": 64}), loses("Job", "-quantize"), loses("Deployment"),
    service_is_deleted, status_is_lost, crash_soon, time_passes,
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(HAPPENINGS), max_size=12))
def test_a_deployment_comes_to_rest_after_anything(happenings):
    logging.disable(logging.CRITICAL)
    world = World()
    world.cluster.put(make.modeldeployment())
    try:
        for happening in [time_passes, quantizes, *happenings]:
            happening(world)
            world.wait(5)
            assert world.condition("Ready", KIND)[0]
            assert decided_twice(world), "the same observation gives the same decision"
    finally:
        logging.disable(logging.NOTSET)


def decided_twice(world):
    observed = world.observed(KEY)
    first, second = (decide(observed, world.now, world.config) for _ in range(2))
    assert first.actions == (), "what was decided has been carried out"
    return first == second
