"""Queues, budgets and what is kept after the end: whole lives of jobs, with a Kueue that does its part by hand."""

import pytest

from support import make
from support.world import World
from tunesmith_api.keys import FINETUNEJOB_KIND, LABEL_QUEUE, MODELDEPLOYMENT_KIND, Reason
from tunesmith_api.reports import CheckpointRef, ProgressReport, TrainerState
from tunesmith_operator.core.kinds import kind_of
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.reconcile.progress import ProgressSample, QuotaSample, QuotaTarget

KEY = Key(FINETUNEJOB_KIND, "ml", "sentiment")
JOB = "sentiment-1"
WORDS = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor h100, 2 more needed"


def started(queue="gpus", **spec):
    world, raw = World(), make.finetunejob(**spec)
    raw["metadata"]["labels"] = {LABEL_QUEUE: queue} if queue else {}
    world.cluster.put(raw)
    world.reconcile()
    return world


def child(world):
    return world.cluster.get("Job", JOB)


def kueue(world, suspend):
    """What Kueue does when it admits a Job, and when it takes that back."""
    world.cluster.change("Job", JOB, {"spec": {"suspend": suspend}})
    reason = "JobSuspended" if suspend else "JobResumed"
    world.job_is(JOB, "Suspended", reason, status="True" if suspend else "False")
    world.reconcile()


def queued_by_default(kind, body):
    """What Kueue's webhook does to a new Job in a namespace whose LocalQueue is named `default`."""
    if kind == "Job" and "uid" not in body["metadata"]:
        body["metadata"]["labels"][LABEL_QUEUE] = "default"
        body["spec"]["suspend"] = True
    return body


def hears(world, words):
    world.samples[KEY] = QuotaSample(child(world)["metadata"]["uid"], words)


def edit(world, **spec):
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", {"spec": spec})
    world.reconcile()


def touched(world):
    return [it for it in world.cluster.writes if it == f"patch Job {JOB}"]


def trains(world, pod, step=40):
    uid = world.cluster.get("Pod", pod)["metadata"]["uid"]
    report = ProgressReport(
        state=TrainerState.TRAINING, heartbeat_unix=world.now.timestamp(), global_step=step, max_steps=80,
        checkpoint=CheckpointRef(step=step, uri=f"s3://checkpoints/sentiment/step-{step:08d}"),
    )  # fmt: skip
    world.samples[KEY] = ProgressSample(uid, report, world.now)


def test_a_minute_in_the_queue_costs_two_writes_and_says_what_kueue_says():
    world = started()
    assert child(world)["spec"]["suspend"] is True
    assert child(world)["metadata"]["labels"][LABEL_QUEUE] == "gpus"
    made = len(world.cluster.writes)
    world.job_is(JOB, "Suspended", "JobSuspended")
    hears(world, WORDS)
    for _ in range(20):
        world.wait(3)
    status, reason, message = world.condition("Succeeded")
    assert (status, reason, world.status()["phase"]) == ("Unknown", "QuotaPending", "Pending")
    assert "queue gpus" in message
    assert WORDS in message
    written = world.cluster.writes[made:] + world.cluster.events
    assert len(written) <= 2, written
    assert world.cluster.events == [("Normal", "QuotaPending")]
    target = QuotaTarget("ml", child(world)["metadata"]["uid"])
    assert kind_of(KEY).decide(world.observed(KEY), world.now, world.config).poll == target


def test_kueue_alone_says_when_a_queued_job_runs_and_a_preemption_is_no_loss():
    world = started()
    world.wait(6)
    kueue(world, suspend=False)
    head = world.pod(JOB, 0, ready=True)
    trains(world, head)
    world.wait(20)
    assert world.condition("Succeeded")[1] == "Training"
    kueue(world, suspend=True)
    world.samples.pop(KEY)
    world.terminates(head)
    world.wait(1)
    world.ends(head, 75, make.failed(Reason.INTERRUPTED))
    world.wait(1)
    world.cluster.remove("Pod", "ml", head)
    world.wait(20)
    assert world.condition("Succeeded")[:2] == ("Unknown", "QuotaPending")
    world._boot()  # an operator that starts anew doesn't know who suspended it
    world.wait(20)
    assert child(world)["spec"]["suspend"] is True
    kueue(world, suspend=False)
    head = world.pod(JOB, 0, "b")
    world.wait(20)
    assert world.condition("Succeeded")[1] == "Starting"
    trains(world, head, 60)
    world.wait(20)
    assert world.condition("Succeeded")[1] == "Training"
    assert (touched(world), world.status()["restarts"]) == ([], 0)
    assert [reason for _, reason in world.cluster.events] == ["QuotaPending", "Training", "QuotaPending"]


def test_a_job_that_kueues_webhook_queues_is_left_to_kueue():
    world = World()
    world.cluster.admit = queued_by_default
    world.cluster.put(make.finetunejob())
    world.reconcile()
    world.wait(6)
    assert "queue default" in world.condition("Succeeded")[2]
    world._boot()
    world.wait(20)
    assert child(world)["spec"]["suspend"] is True
    kueue(world, suspend=False)
    world.wait(20)
    assert child(world)["spec"]["suspend"] is False
    assert touched(world) == []


def test_a_queued_job_that_is_suspended_leaves_the_queue_and_comes_back_without_a_loss():
    world = started()
    world.cluster.cascade = False
    kueue(world, suspend=False)
    head = world.pod(JOB, 0, ready=True)
    trains(world, head)
    world.wait(20)
    edit(world, suspend=True)
    assert child(world) is None, "Kueue would start it again"
    assert touched(world) == []
    world.samples.pop(KEY)
    world.wait(20)
    assert world.condition("Succeeded") == ("Unknown", "Suspended", "Suspended: set spec.suspend to false to go on.")
    assert world.status()["attempts"][0]["outcome"] == "Suspended"
    edit(world, suspend=False)
    world.wait(6)
    assert child(world) is None, "the pods save their checkpoint, and have the names that the next ones need"
    world.cluster.remove("Pod", "ml", head)
    world.wait(6)
    assert child(world)["spec"]["suspend"] is True
    world.wait(20)
    assert world.condition("Succeeded")[:2] == ("Unknown", "QuotaPending")
    kueue(world, suspend=False)
    head = world.pod(JOB, 0, "b")
    world.wait(20)
    assert world.condition("Succeeded")[1] == "Starting"
    trains(world, head, 60)
    world.wait(20)
    assert world.status()["restarts"] == 0
    assert len(world.status()["attempts"]) == 1
    events = [reason for _, reason in world.cluster.events]
    assert not {"JobDeleted", "Restarting"} & set(events), events


def test_a_queued_job_that_is_suspended_before_it_was_admitted_leaves_the_queue_too():
    world = started()
    world.wait(6)
    edit(world, suspend=True)
    assert child(world) is None
    edit(world, suspend=False)
    world.wait(6)
    assert child(world)["spec"]["suspend"] is True
    assert world.status()["restarts"] == 0


def test_who_waits_too_long_for_quota_fails_with_what_it_waited_for():
    world = started(preRunningDeadlineSeconds=60)
    world.job_is(JOB, "Suspended", "JobSuspended")
    hears(world, WORDS)
    world.wait(59)
    assert world.condition("Succeeded")[:2] == ("Unknown", "QuotaPending")
    world.wait(1)
    status, reason, message = world.condition("Succeeded")
    assert (status, reason) == ("False", "QuotaPending")
    assert message.startswith("stopped after 1m (preRunningDeadlineSeconds): ")
    assert WORDS in message
    world.wait(1)
    assert child(world) is None


def test_a_quantize_job_that_kueue_holds_says_so_and_is_left_to_kueue():
    world = World()
    world.cluster.admit = queued_by_default
    world.cluster.put(make.modeldeployment(rollout={"progressDeadlineSeconds": 60}))
    world.reconcile()
    world.wait(20)
    world._boot()
    world.wait(100)
    status, reason, message = world.condition("Ready", MODELDEPLOYMENT_KIND)
    assert (status, reason) == ("False", "QuotaPending")
    assert "Job sentiment-r1-quantize waits in queue default" in message
    assert world.cluster.get("Job", "sentiment-r1-quantize")["spec"]["suspend"] is True
    assert "patch Job sentiment-r1-quantize" not in world.cluster.writes


def test_a_failed_quantize_job_in_a_queue_is_ended_as_kueue_would_start_a_suspended_one_again():
    world = World()
    world.cluster.put(make.modeldeployment(rollout={"progressDeadlineSeconds": 60}))
    world.reconcile()
    name = "sentiment-r1-quantize"
    world.cluster.change("Job", name, {"metadata": {"labels": {LABEL_QUEUE: "default"}}})
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    world.pod(name, phase="Pending", containerStatuses=[{"name": "quantize", "image": "x", "state": waiting}])
    world.reconcile()
    world.wait(61)
    world.wait(61)
    assert world.status(MODELDEPLOYMENT_KIND)["phase"] == "Failed"
    spec = world.cluster.get("Job", name)["spec"]
    assert (spec.get("suspend", False), spec["activeDeadlineSeconds"]) == (False, 1)
    assert world.cluster.writes.count(f"patch Job {name}") == 1


def test_gpu_seconds_are_counted_over_suspensions_and_starts_of_the_operator_and_cost_no_write():
    world = started(queue="", workers={"gpusPerWorker": 1})
    pods = [world.pod(JOB, index, ready=True) for index in (0, 1)]
    trains(world, pods[0], 1)
    world.wait(10)
    before = len(world.cluster.writes)
    world.wait(100)
    assert world.cluster.writes[before:] == [], "nothing but the count has changed"
    trains(world, pods[0], 2)
    world.wait(10)
    assert world.status()["gpuSeconds"] == 2 * 120
    world._boot()
    edit(world, suspend=True)
    world.wait(5)
    for pod in pods:
        world.terminates(pod)
        world.ends(pod, 75)
    edit(world, suspend=False)
    world.wait(1000)
    assert world.status()["gpuSeconds"] == 2 * 125
    for pod in pods:
        world.cluster.remove("Pod", "ml", pod)
    world.pod(JOB, 0, "b", ready=True)
    world.wait(7)
    world.exits(f"{JOB}-0-xb", 0, make.succeeded())
    world.job_is(JOB, "SuccessCriteriaMet")
    world.wait(20)
    assert world.status()["phase"] == "Succeeded"
    assert world.status()["gpuSeconds"] == 2 * 125 + 7


def stops_for_its_budget(world):
    pods = [world.pod(JOB, index, ready=True) for index in (0, 1)]
    trains(world, pods[0], 30)
    world.wait(20)
    foreseen = kind_of(KEY).decide(world.observed(KEY), world.now, world.config).requeue_after
    assert foreseen == pytest.approx(30.0)
    world.wait(foreseen)
    status, reason, _ = world.condition("Succeeded")
    assert (status, reason) == ("Unknown", "BudgetExceeded"), "the workers save their checkpoint"
    return pods


def ends_for_its_budget(world, pods):
    world.samples.pop(KEY)
    for pod in pods:
        world.terminates(pod)
    world.wait(5)
    assert world.condition("Succeeded")[0] == "Unknown"
    saved = CheckpointRef(step=33, uri="s3://checkpoints/sentiment/step-00000033")
    left = make.failed(Reason.INTERRUPTED, message="saved", global_step=33, max_steps=80, checkpoint=saved)
    for pod in pods:
        world.ends(pod, 75, left)
    world.wait(1)
    status, reason, message = world.condition("Succeeded")
    assert (status, reason) == ("False", "BudgetExceeded")
    assert "110 GPU-seconds (budget.maxGpuSeconds: 100)" in message
    found = world.status()
    assert (found["gpuSeconds"], found["phase"], found["checkpoint"]["step"]) == (110, "Failed", 33)
    world.wait(60)
    assert child(world) is None
    assert world.status() == found
    assert world.status()["restarts"] == 0


def test_a_used_up_budget_stops_the_workers_with_a_checkpoint_and_then_the_job():
    world = started(queue="", workers={"gpusPerWorker": 1}, budget={"maxGpuSeconds": 100})
    pods = stops_for_its_budget(world)
    assert child(world)["spec"]["suspend"] is True
    ends_for_its_budget(world, pods)


def test_a_used_up_budget_takes_a_queued_job_out_of_its_queue():
    world = started(workers={"gpusPerWorker": 1}, budget={"maxGpuSeconds": 100})
    world.cluster.cascade = False
    kueue(world, suspend=False)
    pods = stops_for_its_budget(world)
    assert child(world) is None
    assert touched(world) == []
    ends_for_its_budget(world, pods)


def test_a_budget_that_is_raised_in_time_lets_the_job_go_on():
    world = started(queue="", workers={"gpusPerWorker": 1}, budget={"maxGpuSeconds": 100})
    stops_for_its_budget(world)
    edit(world, budget={"maxGpuSeconds": 1000})
    assert child(world)["spec"]["suspend"] is False
    world.wait(20)
    assert world.condition("Succeeded")[1] != "BudgetExceeded"


def test_children_go_before_the_object_which_keeps_its_status():
    world = started(queue="", childrenTTLSecondsAfterFinished=100, ttlSecondsAfterFinished=1000)
    head = world.pod(JOB, 0, ready=True)
    world.exits(head, 0, make.succeeded())
    world.job_is(JOB, "SuccessCriteriaMet")
    world.wait(20)
    assert world.status()["phase"] == "Succeeded"
    ended = world.status()
    world.wait(79)
    assert child(world) is not None
    world.wait(2)
    assert child(world) is None
    assert world.cluster.get("ConfigMap", JOB) is None
    assert world.cluster.of_kind("Pod") == []
    before = len(world.cluster.writes)
    world._boot()
    world.wait(870)
    assert world.cluster.writes[before:] == []
    assert world.status() == ended
    world.wait(30)
    assert world.cluster.get(FINETUNEJOB_KIND, "sentiment") is None


def test_a_preemption_is_waited_out_from_its_own_beginning_however_late_the_job_controller_says_so():
    world = started(preRunningDeadlineSeconds=60)
    kueue(world, suspend=False)
    trains(world, world.pod(JOB, 0, ready=True))
    world.wait(7200)
    world.cluster.change("Job", JOB, {"spec": {"suspend": True}})  # its conditions are still those of before
    world.reconcile()
    assert world.condition("Succeeded")[:2] == ("Unknown", "QuotaPending")
    world.wait(5)
    kueue(world, suspend=True)
    world.wait(59)
    assert world.condition("Succeeded")[:2] == ("Unknown", "QuotaPending")
    world.wait(1)
    assert world.condition("Succeeded")[:2] == ("False", "QuotaPending")


def test_a_job_that_waits_goes_to_the_queue_that_its_label_names_now():
    world = started("gpus")
    world.job_is(JOB, "Suspended", "JobSuspended")
    world.wait(6)
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", {"metadata": {"labels": {LABEL_QUEUE: "night"}}})
    world.wait(20)
    assert child(world)["metadata"]["labels"][LABEL_QUEUE] == "night"
    assert "queue night" in world.condition("Succeeded")[2]
    kueue(world, suspend=False)
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", {"metadata": {"labels": {LABEL_QUEUE: "day"}}})
    world.wait(60)
    assert child(world)["metadata"]["labels"][LABEL_QUEUE] == "night", (
        "Kueue refuses that of a Job that it has admitted"
    )
    assert len(touched(world)) == 1


def test_a_suspended_job_that_is_given_a_queue_and_resumed_in_one_edit_is_put_into_the_queue():
    world = started(queue="", suspend=False)
    world.wait(6)
    edit(world, suspend=True)
    assert child(world)["spec"]["suspend"] is True
    raw = {"metadata": {"labels": {LABEL_QUEUE: "gpus"}}, "spec": {"suspend": False}}
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", raw)
    world.wait(6)
    assert child(world)["metadata"]["labels"].get(LABEL_QUEUE) == "gpus", "Kueue would never hear of it"
    assert child(world)["spec"]["suspend"] is True
    assert world.condition("Succeeded")[1] == "QuotaPending"


def test_the_seconds_in_which_a_preempted_pod_saves_its_checkpoint_are_counted_though_it_is_gone_at_once():
    world = started(workers={"gpusPerWorker": 1})
    kueue(world, suspend=False)
    pods = [world.pod(JOB, index, ready=True) for index in (0, 1)]
    trains(world, pods[0], 1)
    world.wait(100)
    kueue(world, suspend=True)
    world.samples.pop(KEY)
    for pod in pods:
        world.terminates(pod)
    world.wait(10)
    for wait, pod in zip((50, 20), pods, strict=True):
        world.wait(wait)
        world.ends(pod, 75)
        world.wait(1)
        world.cluster.remove("Pod", "ml", pod)
    before = len(world.cluster.writes)
    world._boot()
    world.wait(300)
    assert world.status()["gpuSeconds"] == 160 + 181
    assert world.cluster.writes[before:] == []
