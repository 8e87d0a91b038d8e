"""Whatever happens to a job, in whatever order: it comes to rest, counts never run backwards, and an end is an end."""

import json
import logging

from hypothesis import given, settings
from hypothesis import strategies as st

from support import make
from support.world import World
from tunesmith_api.keys import FINETUNEJOB_KIND, Reason
from tunesmith_api.reports import ProgressReport, TrainerState
from tunesmith_operator.core.finetunejob.decide import decide
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.reconcile.progress import ProgressSample
from tunesmith_operator.core.reconcile.unreadable import Unreadable

KEY = Key(FINETUNEJOB_KIND, "ml", "sentiment")


def head(world):
    return next((it for it in world.cluster.of_kind("Pod") if it["metadata"]["name"].startswith("sentiment-1-0")), None)


def start_pods(world):
    if world.cluster.get("Job", "sentiment-1") and not world.cluster.of_kind("Pod"):
        world.pod("sentiment-1", 0, ready=True)
        world.pod("sentiment-1", 1, ready=True)


def lose_head(world):
    if (pod := head(world)) and pod["status"]["phase"] == "Running":
        world.ends(pod["metadata"]["name"], 137)


def remove_pods(world):
    for pod in world.cluster.of_kind("Pod"):
        world.cluster.remove("Pod", "ml", pod["metadata"]["name"])


def users_error(world):
    if (pod := head(world)) and pod["status"]["phase"] == "Running":
        world.ends(pod["metadata"]["name"], 40, make.failed(Reason.MODEL_INVALID))
        world.job_is("sentiment-1", "FailureTarget", "PodFailurePolicy")


def succeed(world):
    if (pod := head(world)) and pod["status"]["phase"] == "Running":
        world.ends(pod["metadata"]["name"], 0, make.succeeded())
        world.job_is("sentiment-1", "SuccessCriteriaMet", "SuccessPolicy")


def report(world):
    if (pod := head(world)) and pod["status"]["phase"] == "Running":
        step = 10 + len(world.cluster.writes)
        beat = {
            "state": TrainerState.TRAINING,
            "global_step": step,
            "max_steps": 999,
            "heartbeat_unix": world.now.timestamp(),
        }
        world.samples[KEY] = ProgressSample(pod["metadata"]["uid"], ProgressReport(**beat), world.now)


def lose_contact(world):
    world.samples.clear()


def pod_finds_no_node(world):
    if world.cluster.get("Job", "sentiment-1"):
        blocked = {"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available"}
        world.pod("sentiment-1", 1, suffix="n", phase="Pending", conditions=[blocked], containerStatuses=[])


def delete_job(world):
    world.cluster.remove("Job", "ml", "sentiment-1")


def delete_service(world):
    world.cluster.remove("Service", "ml", "sentiment-workers")


def toggle_suspend(world):
    raw = world.cluster.get(FINETUNEJOB_KIND, "sentiment")
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", {"spec": {"suspend": not raw["spec"].get("suspend", False)}})


def toggle_readable(world):
    raw = world.cluster.get(FINETUNEJOB_KIND, "sentiment")
    newer = None if "optimizer" in raw["spec"].get("training", {}) else "Muon"
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", {"spec": {"training": {"optimizer": newer}}})


def crash_soon(world):
    world.cluster.crash_after = len(world.cluster.writes) + 1


def time_passes(world):
    world.wait(31)


HAPPENINGS = [
    start_pods, report, lose_contact, pod_finds_no_node, lose_head, remove_pods, users_error, succeed, delete_job, delete_service, toggle_suspend, toggle_readable, crash_soon, time_passes,
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(HAPPENINGS), max_size=12))
def test_a_job_comes_to_rest_after_anything_and_an_end_is_final(happenings):
    logging.disable(logging.CRITICAL)
    world, ended, restarts, generation = World(), None, 0, 0
    world.cluster.put(make.finetunejob())
    try:
        for happening in [start_pods, *happenings]:
            happening(world)
            world.wait(5)
            status = world.status()
            assert status.get("restarts", 0) >= restarts
            assert status.get("observedGeneration", 0) >= generation
            restarts, generation = status.get("restarts", 0), status.get("observedGeneration", 0)
            if ended is not None:
                assert without_generations(status) == ended
            elif world.condition("Succeeded")[0] != "Unknown" and world.condition("Accepted")[0] == "True":
                ended = without_generations(status)
            assert decided_twice(world), "the same observation gives the same decision"
    finally:
        logging.disable(logging.NOTSET)


def without_generations(status):
    """An edit after the end moves these and nothing else."""
    conditions = [{**it, "observedGeneration": 0} for it in status["conditions"]]
    return json.dumps({**status, "observedGeneration": 0, "conditions": conditions}, sort_keys=True)


def decided_twice(world):
    store = world.controller._store
    if isinstance(store.custom_resource(KEY), Unreadable):
        return True
    observed = world.observed(KEY)
    first, second = (decide(observed, world.now, world.config) for _ in range(2))
    assert first.actions == (), "what was decided has been carried out"
    return first == second
