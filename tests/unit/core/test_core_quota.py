"""A job in a queue of Kueue's: how its Job is made, whose `suspend` is, what it is said to wait for, and for how long."""

from dataclasses import replace

import pytest

from support import make
from tunesmith_api.keys import LABEL_QUEUE, LABEL_QUEUE_PRIORITY, Reason
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_operator.core.finetunejob.children import build
from tunesmith_operator.core.finetunejob.observed import Children
from tunesmith_operator.core.finetunejob.policies import violation
from tunesmith_operator.core.finetunejob.quota import is_queued, quota_startup, waits_in_queue
from tunesmith_operator.core.kubernetes.drift import correction
from tunesmith_operator.core.kubernetes.kueue import admission_words
from tunesmith_operator.core.kubernetes.objects import ConditionView
from tunesmith_operator.core.kubernetes.workloads import JobView
from tunesmith_operator.core.reconcile.progress import QuotaSample

QUEUED = {LABEL_QUEUE: "gpus", LABEL_QUEUE_PRIORITY: "urgent", "team": "nlp"}
WORDS = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor h100, 2 more needed"


def job(labels=QUEUED, **spec):
    raw = make.finetunejob(**spec)
    raw["metadata"]["labels"] = dict(labels)
    return FineTuneJob.model_validate(raw)


def manifest(**more):
    return build(job(**more), make.CONFIG, 1).job


def children(child, quota=None):
    return Children(
        service=None, config_map=None, network_policy=None, job=child, pods=(), orphans=(), rejections=(),
        progress=None, quota=quota,
    )  # fmt: skip


HELD = JobView(namespace="ml", name="sentiment-1", uid="j", suspended=True, queue="gpus", created=make.at(0))


def test_the_job_of_a_queue_is_made_suspended_with_the_labels_that_kueue_looks_at():
    made = manifest()
    assert made.body["spec"]["suspend"] is True
    assert made.body["metadata"]["labels"].items() >= {LABEL_QUEUE: "gpus", LABEL_QUEUE_PRIORITY: "urgent"}.items()
    assert "team" not in made.body["metadata"]["labels"]
    pods = made.body["spec"]["template"]["metadata"]["labels"]
    assert not [name for name in pods if name.startswith("kueue")], "each pod would be queued by itself"
    assert manifest(labels={}).body["spec"]["suspend"] is False


@pytest.mark.parametrize("labels", [QUEUED, {}], ids=["its own queue", "a queue that Kueue's webhook gave it"])
@pytest.mark.parametrize("suspend", [True, False])
def test_suspend_of_a_queued_job_is_never_put_right_and_all_else_is(labels, suspend):
    made = manifest(labels=labels)
    live = {"metadata": {"labels": {LABEL_QUEUE: "default"} | labels}, "spec": {"suspend": suspend}}
    assert correction(made, JobView.of(make.merged(made.body, live))) == {}
    scaled = make.merged(live, {"spec": {"parallelism": 1}})
    assert correction(made, JobView.of(make.merged(made.body, scaled))) == {"spec": {"parallelism": 2}}


@pytest.mark.parametrize("queue", ["another", None])
def test_a_job_that_is_suspended_is_put_into_the_queue_that_its_owner_names_and_one_that_runs_is_left_where_it_is(
    queue,
):
    made = manifest(labels={LABEL_QUEUE: "gpus"})
    live = {"metadata": {"labels": {LABEL_QUEUE: queue, LABEL_QUEUE_PRIORITY: "urgent"}}, "spec": {"suspend": True}}
    wanted = {"metadata": {"labels": {LABEL_QUEUE: "gpus", LABEL_QUEUE_PRIORITY: None}}}
    assert correction(made, JobView.of(make.merged(made.body, live))) == wanted
    live["spec"]["suspend"] = False
    assert correction(made, JobView.of(make.merged(made.body, live))) == {}


def test_suspend_of_a_job_without_a_queue_is_the_specs():
    made = manifest(labels={})
    live = JobView.of(make.merged(made.body, {"spec": {"suspend": True}}))
    assert correction(made, live) == {"spec": {"suspend": False}}


def test_a_job_waits_while_kueue_suspends_it_and_nobody_else_does():
    assert waits_in_queue(job(), children(HELD))
    assert waits_in_queue(job(labels={}), children(HELD)), "a queue that Kueue's webhook gave it"
    assert not waits_in_queue(job(labels={}), children(replace(HELD, queue=""))), "suspended by hand"
    assert not waits_in_queue(job(suspend=True), children(HELD))
    assert not waits_in_queue(job(), children(replace(HELD, suspended=False)))
    assert not waits_in_queue(job(), children(replace(HELD, deleting=True)))
    assert not waits_in_queue(job(), children(None))
    assert is_queued(job(), replace(HELD, queue="")), "somebody took the label away, and Kueue has its Workload still"


def test_the_message_names_the_queue_and_has_kueues_own_words():
    silent = quota_startup(job(), children(HELD), make.at(5)).problem
    assert silent.reason is Reason.QUOTA_PENDING
    assert "queue gpus" in silent.message
    assert "kubectl get localqueues,workloads -n ml" in silent.message
    told = quota_startup(job(), children(HELD, QuotaSample("j", WORDS)), make.at(5)).problem
    assert f"Kueue says: {WORDS}." in told.message
    assert "kubectl" not in told.message
    assert told.message.startswith("Job sentiment-1 waits in queue gpus for quota. ")


def test_it_waits_without_limit_unless_the_spec_gives_one():
    assert quota_startup(job(), children(HELD), make.at(10**6)).expired is None
    limited = job(preRunningDeadlineSeconds=60)
    early = quota_startup(limited, children(HELD), make.at(59))
    assert (early.expired, early.deadline) == (None, make.at(60))
    late = quota_startup(limited, children(HELD), make.at(60))
    assert late.expired is not None
    assert late.expired == late.problem
    since = ConditionView("Suspended", "True", "JobSuspended", "", make.at(500))
    preempted = quota_startup(limited, children(replace(HELD, conditions=(since,))), make.at(559))
    assert (preempted.expired, preempted.deadline) == (None, make.at(560)), "counted from when it was preempted"


def workload(created=0, active=None, **conditions):
    known = [
        {"type": type_, "status": status, "reason": "Pending", "message": message}
        for type_, (status, message) in conditions.items()
    ]
    spec = {} if active is None else {"active": active}
    meta = {"name": f"job-{created}", "creationTimestamp": make.stamp(created)}
    return {"metadata": meta, "spec": spec, "status": {"conditions": known}}


@pytest.mark.parametrize(
    ("workloads", "words"),
    [
        ([], ""),
        ([workload()], ""),
        ([workload(QuotaReserved=("False", WORDS))], WORDS),
        ([workload(Admitted=("False", "waits for a check"), QuotaReserved=("True", "reserved"))], "waits for a check"),
        ([workload(Admitted=("False", "no reservation"), QuotaReserved=("False", WORDS))], WORDS),
        ([workload(Admitted=("True", "yes"), QuotaReserved=("True", "reserved"))], ""),
        ([workload(active=False, QuotaReserved=("False", WORDS))], "Workload job-0 is deactivated (spec.active: false)"),
        ([workload(7, QuotaReserved=("False", "new")), workload(0, QuotaReserved=("False", "old"))], "new"),
        ([workload(QuotaReserved=("False", ""))], "Pending"),
    ],
)  # fmt: skip
def test_of_what_kueue_says_the_first_step_that_is_missing_counts(workloads, words):
    assert admission_words(workloads) == words


@pytest.mark.parametrize("name", ["", "My_Queue", "-gpus", "gpus-"])
def test_a_label_that_names_no_queue_is_refused(name):
    broken = violation(job(labels={LABEL_QUEUE: name}))
    assert broken is not None
    assert LABEL_QUEUE in broken.message
    assert "kubectl get localqueues -n ml" in broken.message


@pytest.mark.parametrize("labels", [{}, {LABEL_QUEUE: "team.a-gpus"}])
def test_other_labels_are_fine(labels):
    assert violation(job(labels=labels)) is None
