"""Rollouts on an in-memory cluster: by steps, promoted, aborted, taken back by analysis, and back to an earlier one."""

import pytest

from support import make
from support.begun import edit, quantize
from support.world import World
from tunesmith_api.keys import MODELDEPLOYMENT_KIND
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.pods.figures import Figures
from tunesmith_operator.core.reconcile.progress import ServersSample

KIND = MODELDEPLOYMENT_KIND
KEY = Key(KIND, "ml", "sentiment")
STEPS = [{"weight": 20, "pauseSeconds": 60}, {"weight": 75}]
CANARY = {"strategy": "Canary", "steps": STEPS}


def serving(replicas=4, **rollout):
    """The first revision answers; a rollout of the second has begun, its files are made."""
    world = World()
    world.cluster.put(make.modeldeployment(replicas=replicas, rollout=rollout))
    world.reconcile()
    settle(world, "r1")
    edit(world, KIND, resources={"memory": "8Gi"})
    quantize(world, "r2")
    return world


def settle(world, *revisions):
    """Files are made and replicas come up, until nothing moves any more."""
    for _ in range(4):
        for revision in revisions:
            quantize(world, revision)
        arrive(world)


def arrive(world):
    """All replicas that are asked for come up, until no more are."""
    for _ in range(12):
        before = replicas(world)
        for raw in world.cluster.of_kind("Deployment"):
            world.rolls_out(raw["metadata"]["name"])
        world.reconcile()
        if replicas(world) == before:
            return
    raise AssertionError(f"it never comes to rest: {before}")


def replicas(world):
    found = world.cluster.of_kind("Deployment")
    return {it["metadata"]["name"].rpartition("-")[2]: it["spec"]["replicas"] for it in found}


def selected(world):
    return world.cluster.get("Service", "sentiment")["spec"]["selector"].get("tunesmith.dev/revision", "both")


def revisions(world):
    return [(it["phase"], it["weight"]) for it in world.status(KIND)["revisions"]]


def progressing(world):
    return world.condition("Progressing", KIND)


def hear(world, requests, errors=0, latency=0.1):
    """The servers of the newest revision say what they have counted in its step."""
    newest = world.status(KIND)["revisions"][-1]
    figures = Figures(requests, errors, {latency / 2: 0, latency: requests})
    world.samples[KEY] = ServersSample(f"{newest['name']}/{newest['stepIndex']}", figures)
    world.reconcile()


def test_a_canary_goes_through_its_steps_and_takes_over():
    world = serving(**CANARY)
    assert (replicas(world), selected(world)) == ({"r1": 4, "r2": 1}, "r1"), "nothing moves before it has answered"
    arrive(world)
    assert (replicas(world), selected(world), revisions(world)) == (
        {"r1": 4, "r2": 1}, "both", [("Active", 80), ("RollingOut", 20)],
    )  # fmt: skip
    assert "step 1 of 2, until 2026" in progressing(world)[2]
    assert world.condition("Ready", KIND)[:2] == ("True", "ReplicasAvailable")
    world.wait(59)
    assert replicas(world) == {"r1": 4, "r2": 1}
    world.wait(1)
    assert replicas(world) == {"r1": 3, "r2": 4}, "as many old ones go as new ones answer"
    arrive(world)
    assert (replicas(world), revisions(world)) == ({"r1": 1, "r2": 4}, [("Active", 25), ("RollingOut", 75)])
    world.wait(20)  # numbers are written at a pace of their own
    status = world.status(KIND)
    assert (status["phase"], status["replicas"], progressing(world)[:2]) == ("Paused", 5, ("True", "Paused"))
    assert "rollout.promote to sentiment-r2" in progressing(world)[2]
    assert ("Normal", "Paused") in world.cluster.events
    world.wait(86_400)
    assert selected(world) == "both"
    edit(world, KIND, rollout={"promote": "sentiment-r2"})
    assert (selected(world), revisions(world)) == ("r2", [("Retired", 0), ("Active", 100)])
    world.wait(11)
    assert replicas(world) == {"r2": 4}
    before = len(world.cluster.writes)
    world.wait(600)
    assert len(world.cluster.writes) == before
    edit(world, KIND, image="localhost/other:1")
    settle(world, "r3")
    assert selected(world) == "both", "what promotes one revision says nothing of the next"


def test_a_rolling_update_replaces_one_replica_after_the_other():
    world = serving(replicas=3, strategy="RollingUpdate")
    seen = []
    for _ in range(4):
        seen.append((replicas(world), selected(world)))
        world.rolls_out("sentiment-r2")
        world.reconcile()
    assert seen == [
        ({"r1": 3, "r2": 1}, "r1"), ({"r1": 2, "r2": 2}, "both"), ({"r1": 1, "r2": 3}, "both"), ({"r1": 1, "r2": 3}, "r2"),
    ]  # fmt: skip
    assert world.status(KIND)["currentRevision"] == "sentiment-r2"


@pytest.mark.parametrize(
    ("analysis", "bad", "words"),
    [
        ({"maxErrorPercent": 5}, {"requests": 50, "errors": 6}, "6 of 50 requests (12 %)"),
        ({"maxLatencyP95Seconds": 0.5}, {"requests": 50, "latency": 2.0}, "took longer than 1.95 s"),
    ],
)
def test_a_bad_canary_is_taken_back_by_itself_and_not_tried_again(analysis, bad, words):
    world = serving(**CANARY, analysis=analysis)
    arrive(world)
    hear(world, requests=19, errors=19, latency=9)
    assert selected(world) == "both"
    world.wait(20)
    assert "Not judged yet: 19 requests" in progressing(world)[2]
    hear(world, **bad)
    assert (selected(world), replicas(world)["r1"]) == ("r1", 4)
    assert progressing(world)[:2] == ("False", "RolledBack")
    assert words in progressing(world)[2]
    assert ("Warning", "RolledBack") in world.cluster.events
    assert replicas(world)["r2"] == 1, "nodes may still send requests there"
    world.wait(11)
    assert replicas(world) == {"r1": 4, "r2": 0}
    status = world.status(KIND)
    assert (status["phase"], status["currentRevision"]) == ("RolledBack", "sentiment-r1")
    assert revisions(world) == [("Active", 100), ("Failed", 0)]
    world.wait(86_400)
    assert (selected(world), len(status["revisions"])) == ("r1", 2)
    world.cluster.remove("Deployment", "ml", "sentiment-r2")
    world.samples.clear()
    arrive(world)
    assert (selected(world), revisions(world)) == ("both", [("Active", 80), ("RollingOut", 20)])


def test_a_canary_that_restarts_is_taken_back():
    world = serving(**CANARY, analysis={"maxRestarts": 2})
    arrive(world)
    labels = world.cluster.get("Deployment", "sentiment-r2")["spec"]["template"]["metadata"]["labels"]
    for restarts, goes_to in ((2, "both"), (3, "r1")):
        box = {"name": "server", "image": "i", "restartCount": restarts, "state": {"running": {}}}
        status = {"phase": "Running", "podIP": "10.0.0.9", "containerStatuses": [box]}
        world.cluster.put(
            {"kind": "Pod", "metadata": {"name": "p", "namespace": "ml", "labels": labels}, "status": status}
        )
        world.reconcile()
        assert selected(world) == goes_to
    assert "restarted 3 times" in progressing(world)[2]


def test_beyond_half_the_old_replicas_come_back_before_the_failed_ones_go():
    world = serving(**CANARY, analysis={"maxErrorPercent": 5})
    arrive(world)
    world.wait(60)
    arrive(world)
    assert replicas(world) == {"r1": 1, "r2": 4}
    hear(world, requests=100, errors=50)
    assert (replicas(world), selected(world)) == ({"r1": 4, "r2": 4}, "both")
    world.rolls_out("sentiment-r1", available=3)
    world.reconcile()
    assert selected(world) == "both"
    world.rolls_out("sentiment-r1")
    world.reconcile()
    assert selected(world) == "r1"
    world.wait(11)
    assert replicas(world) == {"r1": 4, "r2": 0}


@pytest.mark.parametrize("strategy", [{}, {"strategy": "RollingUpdate"}, CANARY])
def test_it_is_judged_after_the_switch_too_and_taken_back(strategy):
    analysis = {"maxErrorPercent": 5, "afterSwitchSeconds": 120}
    world = serving(**strategy, analysis=analysis, promote="sentiment-r2")
    arrive(world)
    assert (selected(world), world.status(KIND)["currentRevision"]) == ("r2", "sentiment-r1")
    assert world.condition("Ready", KIND)[:2] == ("True", "ReplicasAvailable")
    assert "sentiment-r2 gets all requests; until" in progressing(world)[2]
    hear(world, requests=100, errors=9)
    arrive(world)
    assert selected(world) == "r1"
    world.wait(11)
    assert replicas(world) == {"r1": 4, "r2": 0}
    assert progressing(world)[:2] == ("False", "RolledBack")


def test_a_good_one_is_past_judgement_after_the_switch():
    world = serving(analysis={"maxErrorPercent": 5, "afterSwitchSeconds": 120})
    arrive(world)
    hear(world, requests=100, errors=1)
    world.wait(121)
    assert world.status(KIND)["currentRevision"] == "sentiment-r2"
    assert KEY not in world.controller._poller._targets, "nothing is asked when nothing rolls"


def test_only_a_rollout_with_thresholds_asks_servers():
    for analysis, asked in (({}, False), ({"maxErrorPercent": 1}, True)):
        world = serving(**CANARY, analysis=analysis)
        arrive(world)
        assert (KEY in world.controller._poller._targets) == asked


@pytest.mark.parametrize("arrived", [False, True])
def test_an_abort_takes_a_revision_back_and_means_no_other(arrived):
    world = serving(**CANARY)
    if arrived:
        arrive(world)
    edit(world, KIND, rollout={"abort": "sentiment-r2"})
    world.wait(11)
    assert (selected(world), replicas(world)) == ("r1", {"r1": 4, "r2": 0})
    assert progressing(world)[:2] == ("False", "Aborted")
    assert world.status(KIND)["phase"] == "RolledBack"
    edit(world, KIND, rollout={"abort": None})
    world.wait(60)
    assert replicas(world) == {"r1": 4, "r2": 0}, "what was aborted isn't tried again by itself"
    edit(world, KIND, rollout={"abort": "sentiment-r2"}, image="localhost/other:1")
    settle(world, "r3")
    assert revisions(world)[2] == ("RollingOut", 20)
    edit(world, KIND, rollout={"abort": "sentiment-r1"})
    assert revisions(world)[2] == ("RollingOut", 20), "what answers is no rollout"


def test_an_abort_before_there_are_servers_stops_the_quantizer():
    world = World()
    world.cluster.put(make.modeldeployment(rollout={"abort": "sentiment-r1"}))
    world.reconcile()
    assert progressing(world)[:2] == ("False", "Aborted")
    edit(world, KIND, rollout={"abort": None})
    assert world.status(KIND)["phase"] == "Quantizing"
    edit(world, KIND, rollout={"abort": "sentiment-r1"})
    assert world.cluster.get("Job", "sentiment-r1-quantize")["spec"]["suspend"] is True


def test_an_earlier_revision_comes_back_as_it_was_made_and_only_once():
    world = serving()
    arrive(world)
    world.wait(11)
    plan = world.cluster.get("ConfigMap", "sentiment-r1")
    assert plan is not None, "the history keeps what is needed to go back"
    assert world.cluster.get("Job", "sentiment-r1-quantize") is None
    edit(world, KIND, rollout={"rollbackTo": "sentiment-r1"})
    settle(world, "r3")
    world.wait(11)
    memory = [
        it["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
        for it in world.cluster.of_kind("Deployment")
    ]
    assert (memory, replicas(world)) == (["4Gi"], {"r3": 4})
    hashes = [it["hash"] for it in world.status(KIND)["revisions"]]
    assert hashes[0] == hashes[2] != hashes[1]
    edit(world, KIND, image="localhost/other:1")
    world.wait(60)
    assert len(world.status(KIND)["revisions"]) == 3, "as long as it stands, the spec's own model and pods wait"
    edit(world, KIND, rollout={"rollbackTo": None}, image=None)
    settle(world, "r4")
    assert [it["hash"] for it in world.status(KIND)["revisions"]][3] == hashes[1]


def test_what_is_not_kept_cannot_be_gone_back_to():
    world = serving()
    arrive(world)
    edit(world, KIND, rollout={"rollbackTo": "sentiment-r7"})
    assert world.condition("Accepted", KIND)[:2] == ("False", "InvalidSpec")
    assert "(sentiment-r1, sentiment-r2)" in world.condition("Accepted", KIND)[2]
    assert selected(world) == "r2"


def test_the_history_is_bounded():
    world = serving()
    edit(world, KIND, revisionHistoryLimit=2)
    for number in range(3, 6):
        edit(world, KIND, resources={"memory": f"{number}Gi"})
        settle(world, f"r{number}")
        world.wait(11)
    assert sorted(it["metadata"]["name"] for it in world.cluster.of_kind("ConfigMap")) == [
        "sentiment-r4",
        "sentiment-r5",
    ]
    assert [it["number"] for it in world.status(KIND)["revisions"]] == [4, 5]


def test_an_edit_during_a_canary_takes_it_back_before_the_next_begins():
    world = serving(**CANARY)
    arrive(world)
    world.wait(60)
    arrive(world)
    assert replicas(world) == {"r1": 1, "r2": 4}
    edit(world, KIND, image="localhost/other:1")
    assert (selected(world), replicas(world)) == ("both", {"r1": 4, "r2": 4}), "never fewer than are asked for"
    world.rolls_out("sentiment-r1")
    world.reconcile()
    assert (selected(world), len(world.status(KIND)["revisions"])) == ("r1", 2)
    world.wait(11)
    assert [it["phase"] for it in world.status(KIND)["revisions"]] == ["Active", "Failed", "Quantizing"]
    assert world.status(KIND)["revisions"][1]["reason"] == "Superseded"
    assert replicas(world) == {"r1": 4}


def test_replicas_that_a_later_step_lacks_for_too_long_take_it_back():
    world = serving(**CANARY, progressDeadlineSeconds=100)
    arrive(world)
    world.wait(60)
    world.wait(101)
    assert progressing(world)[:2] == ("False", "ProgressDeadlineExceeded")
    assert selected(world) == "r1"


def test_scaling_in_the_middle_keeps_the_share():
    world = serving(**CANARY)
    arrive(world)
    edit(world, KIND, replicas=8)
    arrive(world)
    assert (replicas(world), revisions(world)) == ({"r1": 8, "r2": 2}, [("Active", 80), ("RollingOut", 20)])


def test_an_edit_of_the_deadline_restarts_no_pod():
    world = serving()
    arrive(world)
    template = world.cluster.get("Deployment", "sentiment-r2")["spec"]["template"]
    edit(world, KIND, rollout={"progressDeadlineSeconds": 4000})
    found = world.cluster.get("Deployment", "sentiment-r2")["spec"]
    assert found["template"] == template
    assert found["progressDeadlineSeconds"] == 4000


def test_pods_that_answer_are_moved_one_at_a_time():
    world = serving(**CANARY)
    budget = world.cluster.get("PodDisruptionBudget", "sentiment")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"]["tunesmith.dev/revision"] == "r1"
    arrive(world)
    selector = world.cluster.get("PodDisruptionBudget", "sentiment")["spec"]["selector"]["matchLabels"]
    assert selector == world.cluster.get("Service", "sentiment")["spec"]["selector"]


def test_a_lost_status_goes_on_from_what_answers():
    world = serving(**CANARY)
    arrive(world)
    raw = world.cluster.get(KIND, "sentiment")
    raw.pop("status")
    world.cluster.put(raw)
    world.wait(1)
    assert (selected(world), world.status(KIND)["currentRevision"]) == ("both", "sentiment-r1")
    assert revisions(world) == [("Active", 80), ("RollingOut", 20)]
