"""Edits of a live object: carried out, or refused in words while what was accepted before goes on and is kept right."""

from support import make
from support.begun import REPAIRED, edit, own_fields, quantize, quantizing, serving, training
from support.world import World
from tunesmith_api.keys import FINETUNEJOB_KIND, MODELDEPLOYMENT_KIND


def test_bounds_that_are_changed_after_the_start_are_carried_out_on_the_job():
    world = training()
    edit(world, FINETUNEJOB_KIND, activeDeadlineSeconds=3600, failurePolicy={"backoffLimit": 9})
    spec = world.cluster.get("Job", "sentiment-1")["spec"]
    assert (spec["activeDeadlineSeconds"], spec["backoffLimit"]) == (3600, 9)
    assert world.status()["observedGeneration"] == 2
    assert REPAIRED not in world.cluster.events, "nobody else has changed anything"
    edit(world, FINETUNEJOB_KIND, activeDeadlineSeconds=None)
    assert "activeDeadlineSeconds" not in world.cluster.get("Job", "sentiment-1")["spec"]


def test_bounds_that_are_changed_before_the_first_status_replace_no_job_and_other_edits_do():
    world = World()
    world.cluster.put(make.finetunejob())
    world.reconcile()
    uid = world.cluster.get("Job", "sentiment-1")["metadata"]["uid"]
    assert "startTime" not in world.status()
    edit(world, FINETUNEJOB_KIND, activeDeadlineSeconds=3600, failurePolicy={"backoffLimit": 9})
    world.wait(1)
    job = world.cluster.get("Job", "sentiment-1")
    assert job["metadata"]["uid"] == uid
    assert (job["spec"]["activeDeadlineSeconds"], job["spec"]["backoffLimit"]) == (3600, 9)
    edit(world, FINETUNEJOB_KIND, workers={"replicas": 3})
    world.wait(2)
    job = world.cluster.get("Job", "sentiment-1")
    assert (job["metadata"]["uid"] != uid, job["spec"]["completions"]) == (True, 3)


def test_patience_and_time_to_live_that_are_changed_later_count_at_once():
    world = World()
    world.cluster.put(make.finetunejob())
    world.reconcile()
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    containers = [{"name": "trainer", "image": "i", "state": waiting}]
    world.pod("sentiment-1", 0, phase="Pending", containerStatuses=containers)
    world.wait(20)
    assert world.condition("Succeeded")[0] == "Unknown"
    edit(world, FINETUNEJOB_KIND, failurePolicy={"startupTimeoutSeconds": 10})
    assert world.condition("Succeeded")[:2] == ("False", "ImagePullFailed")
    assert "stopped after 10s" in world.condition("Succeeded")[2]
    edit(world, FINETUNEJOB_KIND, ttlSecondsAfterFinished=5)
    world.wait(6)
    assert world.cluster.get(FINETUNEJOB_KIND, "sentiment") is None


def test_a_worker_that_finds_no_node_is_waited_for_as_long_as_the_job_says():
    world = World()
    world.cluster.put(make.finetunejob())
    world.reconcile()
    world.pod("sentiment-1", 0)
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes: no GPU"}
    world.pod("sentiment-1", 1, phase="Pending", conditions=[condition], containerStatuses=[])
    world.wait(100_000)
    assert world.condition("Succeeded")[:2] == ("Unknown", "Unschedulable")
    edit(world, FINETUNEJOB_KIND, preRunningDeadlineSeconds=3600)
    assert world.condition("Succeeded")[:2] == ("False", "Unschedulable")
    assert "stopped after 1h (preRunningDeadlineSeconds): pod sentiment-1-1" in world.condition("Succeeded")[2]
    world.wait(1)
    assert world.cluster.get("Job", "sentiment-1") is None


def test_the_verdict_quotes_the_bounds_that_the_job_had():
    for change, reason, quoted in (
        ({"activeDeadlineSeconds": 3600}, "DeadlineExceeded", "activeDeadlineSeconds (1m)"),
        ({"failurePolicy": {"backoffLimit": 50}}, "BackoffLimitExceeded", "gave up after 3 retries"),
    ):
        world = World()
        world.cluster.put(make.finetunejob(activeDeadlineSeconds=60))
        world.reconcile()
        world.ends(world.pod("sentiment-1", 0), 1)
        world.job_is("sentiment-1", "Failed", reason)
        edit(world, FINETUNEJOB_KIND, **change)
        assert quoted in world.condition("Succeeded")[2]


INVALID = {"engine": {"contextLength": 1_048_576, "parallelRequests": 64}}


def test_an_edit_that_is_refused_leaves_what_serves_true_and_in_repair():
    world = serving(replicas=2)
    edit(world, **INVALID)
    assert world.condition("Accepted", MODELDEPLOYMENT_KIND)[:2] == ("False", "InvalidSpec")
    assert world.condition("Ready", MODELDEPLOYMENT_KIND)[:2] == ("True", "ReplicasAvailable")
    assert world.status(MODELDEPLOYMENT_KIND)["observedGeneration"] == 1
    before = own_fields(world, "Deployment", "sentiment-r1")
    world.cluster.remove("Deployment", "ml", "sentiment-r1")
    world.wait(5)
    assert world.condition("Ready", MODELDEPLOYMENT_KIND)[:2] == ("False", "ReplicasUnavailable")
    assert own_fields(world, "Deployment", "sentiment-r1") == before
    world.rolls_out("sentiment-r1", available=1)
    world.wait(5)
    assert world.condition("Ready", MODELDEPLOYMENT_KIND)[0] == "Unknown"
    assert world.status(MODELDEPLOYMENT_KIND)["display"]["ready"] == "1/2"
    edit(world, replicas=3)
    assert world.cluster.get("Deployment", "sentiment-r1")["spec"]["replicas"] == 3
    world.cluster.change("Service", "sentiment", {"spec": {"selector": {"app": "mine"}}})
    world.reconcile()
    assert "app" not in world.cluster.get("Service", "sentiment")["spec"]["selector"]
    assert REPAIRED in world.cluster.events
    assert len(world.status(MODELDEPLOYMENT_KIND)["revisions"]) == 1
    edit(world, engine={"contextLength": 4096, "parallelRequests": 1})
    assert world.condition("Accepted", MODELDEPLOYMENT_KIND)[0] == "True"
    assert world.status(MODELDEPLOYMENT_KIND)["latestRevision"] == "sentiment-r2"


def test_a_rollout_under_way_goes_on_when_the_next_edit_is_refused():
    world = quantizing()
    edit(world, **INVALID)
    quantize(world)
    assert world.cluster.get("Deployment", "sentiment-r1")
    world.rolls_out("sentiment-r1")
    world.wait(5)
    assert world.condition("Ready", MODELDEPLOYMENT_KIND)[:2] == ("True", "ReplicasAvailable")
    assert world.condition("Accepted", MODELDEPLOYMENT_KIND)[0] == "False"


def test_what_serves_is_repaired_though_its_source_is_gone():
    world = World()
    world.cluster.put(make.finetunejob(name="tune"))
    world.cluster.put(make.modeldeployment(source={"uri": None, "fineTuneJobRef": {"name": "tune"}}, storage=None))
    world.reconcile()
    world.ends(world.pod("tune-1", 0), 0, make.succeeded())
    world.job_is("tune-1", "Complete")
    world.reconcile()
    quantize(world)
    world.rolls_out("sentiment-r1")
    world.wait(5)
    before = own_fields(world, "Deployment", "sentiment-r1")
    world.cluster.remove(FINETUNEJOB_KIND, "ml", "tune")
    world.cluster.remove("Deployment", "ml", "sentiment-r1")
    world.wait(5)
    assert own_fields(world, "Deployment", "sentiment-r1") == before


def test_the_revision_that_answers_is_repaired_while_a_newer_one_is_on_its_way():
    world = serving()
    before = own_fields(world, "Deployment", "sentiment-r1")
    edit(world, resources={"memory": "8Gi"})
    world.cluster.change("Deployment", "sentiment-r1", {"spec": {"template": {"spec": {"containers": []}}}})
    world.reconcile()
    assert own_fields(world, "Deployment", "sentiment-r1") == before
    world.cluster.remove("Deployment", "ml", "sentiment-r1")
    world.wait(5)
    assert own_fields(world, "Deployment", "sentiment-r1") == before


def test_a_revision_of_an_older_operator_without_a_template_is_left_as_it_is_but_scaled():
    world = serving()
    config_map = world.cluster.get("ConfigMap", "sentiment-r1")
    del config_map["data"]["template.json"]
    config_map["metadata"]["annotations"]["tunesmith.dev/spec-hash"] = "older"
    world.cluster.put(config_map)
    edit(world, **INVALID)
    world.cluster.change("Deployment", "sentiment-r1", {"spec": {"strategy": {"type": "Recreate"}, "replicas": 5}})
    world.reconcile()
    spec = world.cluster.get("Deployment", "sentiment-r1")["spec"]
    assert (spec["strategy"]["type"], spec["replicas"]) == ("Recreate", 1)
