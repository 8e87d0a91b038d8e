"""A FineTuneJob's whole life on an in-memory cluster: engine and core together, crashes between any two writes."""

import pytest

from support import make
from support.fakecluster import FakeCluster
from support.world import World
from tunesmith_api.keys import FINETUNEJOB_KIND, Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import CheckpointRef, DatasetFacts, ProgressReport, TrainerState
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.reconcile.progress import ProgressSample

KEY = Key(FINETUNEJOB_KIND, "ml", "sentiment")


def report(world: World, pod: str, **values) -> None:
    raw = world.cluster.get("Pod", pod)
    defaults = {"state": TrainerState.TRAINING, "global_step": 6, "max_steps": 10, "loss": 0.4123, "eta_seconds": 185}
    world.samples[KEY] = ProgressSample(
        raw["metadata"]["uid"], ProgressReport(**{**defaults, **values}), values.pop("alive_at", world.now)
    )


def started(world: World | None = None, **spec) -> World:
    world = world or World()
    world.cluster.put(make.finetunejob(**spec))
    world.reconcile()
    world.wait(6)  # so long the first status waits for more to say
    return world


def train_to_the_end(world: World) -> None:
    started(world)
    head, other = world.pod("sentiment-1", 0, ready=True), world.pod("sentiment-1", 1, ready=True)
    world.reconcile()
    report(world, head, checkpoint=CheckpointRef(step=5, uri="s3://checkpoints/sentiment/step-00000005"))
    world.wait(5)
    world.ends(head, 0, make.succeeded())
    world.cluster.remove("Pod", "ml", other)
    world.job_is("sentiment-1", "SuccessCriteriaMet", "SuccessPolicy")
    world.job_is("sentiment-1", "Complete", "SuccessPolicy")
    world.reconcile()


def test_children_are_made_once_and_the_job_last():
    world = started()
    children = [write for write in world.cluster.writes if not write.startswith("status")]
    assert children == [
        "create Service sentiment-workers",
        "create NetworkPolicy sentiment-workers",
        "create ConfigMap sentiment-1",
        "create Secret sentiment-1-ray-uid-1",
        "create Job sentiment-1",
    ]
    plan = TrainingPlan.from_json(world.cluster.get("ConfigMap", "sentiment-1")["data"]["plan.json"])
    assert plan.head_host == "sentiment-1-0.sentiment-workers"
    assert world.cluster.get("Secret", "sentiment-1-ray-uid-1")["stringData"] == {"token": "token"}
    status = world.status()
    assert status["startTime"]
    assert status["observedGeneration"] == 1
    assert status["attempts"][0]["outcome"] == "Running"


def test_from_start_to_finish_people_see_progress_and_the_model():
    world = started()
    head = world.pod("sentiment-1", 0, ready=True)
    world.pod("sentiment-1", 1, ready=True)
    world.wait(10)
    assert world.status()["phase"] == "Starting"
    assert world.status()["display"]["workers"] == "2/2"
    report(world, head)
    world.wait(5)
    assert world.status()["phase"] == "Training"
    assert world.status()["display"] == {
        "progress": "60%", "step": "6/10", "loss": "0.412", "eta": "3m", "workers": "2/2",
    }  # fmt: skip
    world.ends(head, 0, make.succeeded())
    world.job_is("sentiment-1", "SuccessCriteriaMet", "SuccessPolicy")
    world.reconcile()
    status = world.status()
    assert world.condition("Succeeded")[:2] == ("True", "Completed")
    assert status["phase"] == "Succeeded"
    assert status["model"] == {"uri": "s3://models/sentiment", "digest": make.DIGEST, "sizeBytes": 12}
    assert status["metrics"]["evalLoss"] == "0.5"
    assert status["display"]["progress"] == "100%"
    assert status["display"]["eta"] == ""
    assert status["attempts"][0]["outcome"] == "Succeeded"
    assert world.cluster.events == [("Normal", "Completed")], "that it trains is what everybody expects"


def test_the_status_says_what_servers_have_to_know_of_the_model():
    world = started()
    head = world.pod("sentiment-1", 0, ready=True)
    model = make.succeeded().model.model_copy(update={"rehearsed": "Q4_0", "reads_images": True})
    world.ends(head, 0, make.succeeded(model=model))
    world.job_is("sentiment-1", "SuccessCriteriaMet", "SuccessPolicy")
    world.reconcile()
    assert world.status()["model"] == {
        "uri": "s3://models/sentiment", "digest": make.DIGEST, "sizeBytes": 12, "rehearsed": "Q4_0", "readsImages": True,
    }  # fmt: skip


def test_an_operator_that_starts_writes_nothing_about_a_running_job_that_it_has_not_heard_yet():
    world = started()
    head, other = world.pod("sentiment-1", 0, ready=True), world.pod("sentiment-1", 1, ready=True)
    report(world, head, heartbeat_unix=world.now.timestamp())
    world.wait(5)
    shown, writes = world.status(), len(world.cluster.writes)
    del world.samples[KEY]
    world._boot()
    world.wait(1)
    assert world.cluster.writes[writes:] == []
    assert world.status() == shown
    world.cluster.remove("Pod", "ml", other)
    world.wait(1)
    world.wait(6)
    assert world.status()["display"]["eta"] == ""


def test_what_the_data_turned_out_to_hold_stands_in_the_status():
    world = started(dataset={"onBadRow": "Skip", "splitPercent": 10})
    head = world.pod("sentiment-1", 0, ready=True)
    report(world, head)
    world.wait(5)
    assert "dataset" not in world.status()
    facts = DatasetFacts(train_examples=90, eval_examples=10, bad_rows=2, first_bad_row="t.jsonl line 7: " + "x" * 9000)
    report(world, head, dataset=facts)
    world.wait(10)
    found = world.status()["dataset"]
    assert (found["trainExamples"], found["evalExamples"], found["badRows"]) == (90, 10, 2)
    assert found["firstBadRow"].startswith("t.jsonl line 7: x")
    assert len(found["firstBadRow"]) == 500
    world.ends(head, 0, make.succeeded(dataset=facts.model_copy(update={"duplicates": 3, "first_bad_row": "line 7"})))
    world.job_is("sentiment-1", "Complete", "SuccessPolicy")
    world.reconcile()
    assert world.status()["dataset"] == {
        "trainExamples": 90, "evalExamples": 10, "badRows": 2, "firstBadRow": "line 7", "duplicates": 3,
    }  # fmt: skip


def test_facts_of_the_data_outlive_a_trainer_that_starts_again():
    world = started()
    head = world.pod("sentiment-1", 0, ready=True)
    report(world, head, dataset=DatasetFacts(train_examples=90))
    world.wait(5)
    report(world, head, state=TrainerState.STARTING)
    world.wait(5)
    assert world.status()["dataset"]["trainExamples"] == 90


def test_a_job_from_start_to_finish_costs_at_most_nine_writes():
    world = World()
    train_to_the_end(world)
    assert len(world.cluster.writes) + len(world.cluster.events) <= 9, world.cluster.writes


def test_a_job_that_runs_through_costs_eight_writes():
    world = World()
    world.cluster.put(make.finetunejob())
    world.reconcile()
    head = world.pod("sentiment-1", 0, ready=True)
    world.pod("sentiment-1", 1, ready=True)
    world.wait(2)
    report(world, head)
    world.wait(2)
    assert world.status()["phase"] == "Training"
    world.ends(head, 0, make.succeeded())
    world.job_is("sentiment-1", "SuccessCriteriaMet", "SuccessPolicy")
    world.wait(1)
    assert world.condition("Succeeded")[:2] == ("True", "Completed")
    assert world.cluster.writes.count("status FineTuneJob sentiment") == 2
    assert len(world.cluster.writes) == 7, world.cluster.writes
    assert world.cluster.events == [("Normal", "Completed")]


def test_the_first_status_waits_a_moment_for_more_to_say_and_the_api_server_says_pending_meanwhile():
    world = World()
    world.cluster.put(make.finetunejob())
    world.reconcile()
    assert world.cluster.get("Job", "sentiment-1") is not None
    assert world.status()["phase"] == "Pending"
    assert world.condition("Succeeded") == ("Unknown", "Pending", "Waiting for the operator.")
    world.wait(4)
    assert "startTime" not in world.status()
    world.wait(2)
    assert world.status()["startTime"]
    (summary,) = [it for it in world.status()["conditions"] if it["type"] == "Succeeded"]
    assert summary["lastTransitionTime"] == world.stamp(), "the default's time is nobody's"


def test_a_first_status_with_something_wrong_in_it_does_not_wait():
    world = World()
    world.cluster.put(make.finetunejob(name="refused", output={"uri": "s3://checkpoints/sentiment/out"}))
    world.cluster.put(make.finetunejob())
    world.reconcile()
    assert world.condition("Succeeded", name="refused")[:2] == ("False", "InvalidSpec")
    waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}}
    containers = [{"name": "trainer", "image": "i", "state": waiting}]
    world.pod("sentiment-1", 0, phase="Pending", containerStatuses=containers)
    world.wait(1)
    assert world.condition("Succeeded")[:2] == ("Unknown", "SecretNotFound")
    assert world.status()["startTime"]


@pytest.mark.parametrize("change", [{"training": {"maxSteps": 7}}, {"workers": {"resources": {"memory": "2Gi"}}}])
def test_an_edit_before_the_start_is_in_the_status_takes_effect(change):
    world = World()
    world.cluster.put(make.finetunejob())
    world.reconcile()
    first = world.cluster.get("Job", "sentiment-1")
    pod = world.pod("sentiment-1", 0)
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", {"spec": change})
    world.wait(1)
    assert world.cluster.get("Pod", pod) is None
    job = world.cluster.get("Job", "sentiment-1")
    assert job["metadata"]["uid"] != first["metadata"]["uid"]
    plan = TrainingPlan.from_json(world.cluster.get("ConfigMap", "sentiment-1")["data"]["plan.json"])
    memory = job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
    assert (plan.training.max_steps, memory) in ((7, "1Gi"), (None, "2Gi"))
    world.wait(6)
    assert world.status()["observedGeneration"] == 2
    assert world.status()["restarts"] == 0


def test_a_job_that_ends_before_its_first_status_has_one_status_and_no_other():
    world = World()
    world.cluster.put(make.finetunejob())
    world.reconcile()
    head, other = world.pod("sentiment-1", 0, ready=True), world.pod("sentiment-1", 1, ready=True)
    world.ends(head, 0, make.succeeded())
    world.cluster.remove("Pod", "ml", other)
    world.job_is("sentiment-1", "SuccessCriteriaMet", "SuccessPolicy")
    world.job_is("sentiment-1", "Complete", "SuccessPolicy")
    world.reconcile()
    assert (
        world.status()["observedGeneration"]
        == world.cluster.get(FINETUNEJOB_KIND, "sentiment")["metadata"]["generation"]
    )
    world.wait(60)
    assert sum(write.startswith("status") for write in world.cluster.writes) == 1


def test_a_finished_job_is_never_written_again():
    world = World()
    train_to_the_end(world)
    before = len(world.cluster.writes)
    for _ in range(10):
        world.wait(600)
    assert len(world.cluster.writes) == before


@pytest.mark.parametrize("crash_after", range(1, 13))
def test_a_crash_after_any_write_changes_nothing_about_the_end(crash_after):
    calm, crashed = World(), World()
    train_to_the_end(calm)
    crashed.cluster.crash_after = crash_after
    train_to_the_end(crashed)
    assert crashed.restarts == (1 if crash_after <= len(calm.cluster.writes) else 0)
    assert outline(crashed.cluster) == outline(calm.cluster)


def outline(cluster: FakeCluster) -> dict:
    """All objects without what differs from run to run."""
    result = {}
    for name, raw in cluster.objects.items():
        spec, status = raw.get("spec"), dict(raw.get("status") or {})
        result[name] = (sorted(raw["metadata"].get("labels", {}).items()), spec, status)
    return result


def test_a_deleted_job_is_made_again_and_counts_as_a_restart():
    world = started()
    head = world.pod("sentiment-1", 0, ready=True)
    world.reconcile()
    report(world, head, restarts=2)
    world.wait(5)
    assert world.status()["restarts"] == 2
    world.cluster.remove("Job", "ml", "sentiment-1")
    world.reconcile()
    assert world.cluster.get("Job", "sentiment-1") is not None
    assert world.status()["restarts"] == 3
    world.pod("sentiment-1", 0, ready=True, suffix="2")
    world.reconcile()
    assert world.status()["restarts"] == 3
    status, reason, message = world.condition("Succeeded")
    assert (status, reason) == ("Unknown", "JobDeleted")
    assert message.startswith("Job sentiment-1 was deleted and is created again; training starts again.")
    assert world.cluster.events[-1] == ("Warning", "JobDeleted")
    report(world, "sentiment-1-0-x2", restarts=3)
    world.wait(5)
    assert world.condition("Succeeded")[1] == "Training"


def test_a_job_deleted_by_hand_waits_for_the_pods_of_its_predecessor():
    world = started()
    pod = world.pod("sentiment-1", 0)
    raw = world.cluster.get("Job", "sentiment-1")
    world.cluster.remove("Job", "ml", "sentiment-1", cascade=False)
    world.wait(10)
    assert world.cluster.get("Job", "sentiment-1") is None
    assert "sentiment-1-0-x" in world.condition("Succeeded")[2]
    world.cluster.remove("Pod", "ml", pod)
    world.reconcile()
    assert world.cluster.get("Job", "sentiment-1")["metadata"]["uid"] != raw["metadata"]["uid"]


def test_a_namesake_waits_until_the_children_of_its_predecessor_are_gone():
    world = started()
    world.cluster.remove(FINETUNEJOB_KIND, "ml", "sentiment", cascade=False)
    world.cluster.put(make.finetunejob())
    world.wait(5)
    world.wait(6)
    assert "earlier job" in world.condition("Succeeded")[2]
    for kind in ("Service", "NetworkPolicy", "ConfigMap", "Job"):
        for raw in world.cluster.of_kind(kind):
            world.cluster.remove(kind, "ml", raw["metadata"]["name"])
    world.reconcile()
    assert world.cluster.get("Job", "sentiment-1") is not None


def test_a_job_that_is_suspended_from_the_start_has_no_children_until_it_is_resumed():
    world = started(suspend=True)
    assert world.cluster.of_kind("Job") == []
    assert world.status()["phase"] == "Suspended"
    assert "startTime" not in world.status()
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", {"spec": {"suspend": False, "training": {"maxSteps": 7}}})
    world.reconcile()
    plan = TrainingPlan.from_json(world.cluster.get("ConfigMap", "sentiment-1")["data"]["plan.json"])
    assert plan.training.max_steps == 7


def test_suspend_and_resume_only_toggle_the_job():
    world = started()
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", {"spec": {"suspend": True}})
    world.reconcile()
    assert world.cluster.get("Job", "sentiment-1")["spec"]["suspend"] is True
    assert world.status()["phase"] == "Suspended"
    assert world.status()["attempts"][0]["outcome"] == "Suspended"
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", {"spec": {"suspend": False}})
    world.reconcile()
    assert world.cluster.get("Job", "sentiment-1")["spec"]["suspend"] is False
    assert world.cluster.writes.count("patch Job sentiment-1") == 2


def test_a_lost_service_is_made_again_and_a_changed_plan_is_not():
    world = started()
    world.cluster.remove("Service", "ml", "sentiment-workers")
    world.cluster.change("ConfigMap", "sentiment-1", {"metadata": {"annotations": {"tunesmith.dev/spec-hash": "old"}}})
    before = len(world.cluster.writes)
    world.reconcile()
    assert world.cluster.writes[before:] == ["create Service sentiment-workers"]


def test_a_child_that_is_refused_is_named_and_the_rest_is_not_started():
    world = World()
    world.cluster.refuse = lambda write: "forbidden: exceeded quota" if write == "create Job sentiment-1" else None
    started(world)
    status, reason, message = world.condition("ChildrenApplied")
    assert (status, reason) == ("False", "ApplyFailed")
    assert message == "Job sentiment-1: forbidden: exceeded quota"
    assert world.condition("Succeeded")[:2] == ("Unknown", "ApplyFailed")
    assert world.status().get("observedGeneration", 0) == 0
    assert "startTime" not in world.status()
    world.cluster.refuse = lambda write: None
    world.wait(25)
    assert world.condition("ChildrenApplied")[0] == "True"
    assert world.status()["observedGeneration"] == 1


def test_somebody_elses_service_of_that_name_is_not_taken_over():
    world = World()
    world.cluster.put(
        {"kind": "Service", "metadata": {"name": "sentiment-workers", "namespace": "ml"}, "spec": {"mine": 1}}
    )
    started(world)
    assert world.cluster.get("Service", "sentiment-workers")["spec"] == {"mine": 1}
    assert "Service sentiment-workers" in world.condition("ChildrenApplied")[2]
    assert world.cluster.of_kind("Job") == []


def test_a_job_whose_pods_cannot_start_is_stopped_for_good():
    world = started()
    waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}}
    containers = [{"name": "trainer", "image": "i", "state": waiting}]
    world.pod("sentiment-1", 0, phase="Pending", containerStatuses=containers)
    world.reconcile()
    status, reason, message = world.condition("Succeeded")
    assert (status, reason) == ("Unknown", "SecretNotFound")
    assert "AWS_ACCESS_KEY_ID" in message
    world.wait(30)
    assert world.cluster.get("Job", "sentiment-1") is not None
    world.wait(31)
    status, reason, message = world.condition("Succeeded")
    assert (status, reason) == ("False", "SecretNotFound")
    assert message.startswith("stopped after 1m")
    assert world.cluster.get("Job", "sentiment-1") is None
    before = len(world.cluster.writes)
    world.wait(600)
    assert len(world.cluster.writes) == before


def test_a_missing_secret_for_the_hub_is_told_by_its_field():
    world = started(huggingFace={"secretRef": {"name": "hub"}})
    waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}}
    containers = [{"name": "trainer", "image": "i", "state": waiting}]
    world.pod("sentiment-1", 0, phase="Pending", containerStatuses=containers)
    world.reconcile()
    status, reason, message = world.condition("Succeeded")
    assert (status, reason) == ("Unknown", "SecretNotFound")
    assert "Secret hub in namespace ml with the key HF_TOKEN (spec.huggingFace.secretRef names it)" in message
    assert "AWS" not in message


def test_the_object_is_deleted_when_its_time_after_the_end_is_over():
    world = World()
    started(world, ttlSecondsAfterFinished=100)
    head = world.pod("sentiment-1", 0)
    world.ends(head, 0, make.succeeded())
    world.job_is("sentiment-1", "Complete")
    world.reconcile()
    world.wait(99)
    assert world.cluster.get(FINETUNEJOB_KIND, "sentiment") is not None
    world.wait(2)
    assert world.cluster.objects == {}


def test_a_policy_violation_is_reported_and_goes_away_with_an_edit():
    world = started(output={"uri": "s3://checkpoints/sentiment/out"})
    assert world.condition("Accepted")[:2] == ("False", "InvalidSpec")
    assert "spec.checkpoint.uri" in world.condition("Accepted")[2]
    assert world.cluster.of_kind("Job") == []
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", {"spec": {"output": {"uri": "s3://models/sentiment"}}})
    world.reconcile()
    assert world.condition("Accepted")[0] == "True"
    assert world.cluster.get("Job", "sentiment-1") is not None


def test_a_spec_of_a_newer_version_is_refused_by_field_and_other_jobs_go_on():
    world = World()
    world.cluster.put(make.finetunejob(name="future", training={"optimizer": "Muon"}))
    started(world)
    status, reason, message = world.condition("Accepted", name="future")
    assert (status, reason) == ("False", "InvalidSpec")
    assert "spec.training.optimizer" in message
    assert world.cluster.get("Job", "future-1") is None
    assert world.cluster.get("Job", "sentiment-1") is not None


def test_running_numbers_are_written_at_most_once_per_poll():
    world = started()
    head = world.pod("sentiment-1", 0, ready=True)
    world.reconcile()
    report(world, head, global_step=1)
    world.wait(5)
    before = len(world.cluster.writes)
    for step in range(2, 8):
        report(world, head, global_step=step)
        world.wait(0.5)
    assert len(world.cluster.writes) - before <= 2


def test_a_heartbeat_alone_is_not_written_but_a_silent_trainer_is_told():
    world = started()
    head = world.pod("sentiment-1", 0, ready=True)
    world.pod("sentiment-1", 1, ready=True)
    report(world, head, heartbeat_unix=1000.0)
    world.wait(5)
    before = len(world.cluster.writes)
    report(world, head, heartbeat_unix=1010.0)
    world.wait(10)
    assert len(world.cluster.writes) == before
    silent_since = world.now
    world.now = make.at(400)
    world.samples[KEY] = ProgressSample(world.samples[KEY].pod_uid, world.samples[KEY].report, silent_since)
    world.reconcile()
    assert "No sign of life" in world.condition("Succeeded")[2]
    assert world.condition("Succeeded")[:2] == ("Unknown", Reason.TRAINING)
