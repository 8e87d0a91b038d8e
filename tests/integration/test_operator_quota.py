"""Queues, budgets and what is kept after the end, on a real API server.

Kueue itself isn't there: a thread does to Jobs and Workloads what its Job controller does (0.19: it suspends what it
hasn't admitted, starts what it has, whoever suspended it, and says in a Workload what is missing), and a
MutatingAdmissionPolicy what its webhook does in a namespace with a default queue.
"""

import contextlib
import json
import threading
import time
from datetime import UTC, datetime

import pytest

from devcluster import CommandFailed
from support import make
from support.fakekubelet import NODE, ended, running
from tunesmith_api.keys import LABEL_QUEUE, LABEL_WORKLOAD_JOB

WORDS = "insufficient unused quota for nvidia.com/gpu in flavor default-flavor"
WORKLOAD_CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "workloads.kueue.x-k8s.io"},
    "spec": {
        "group": "kueue.x-k8s.io",
        "scope": "Namespaced",
        "names": {"kind": "Workload", "plural": "workloads", "singular": "workload", "listKind": "WorkloadList"},
        "versions": [
            {
                "name": "v1beta2",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


class Kueue:
    """Admits Jobs of a namespace, oldest first, as long as their GPUs fit the quota."""

    def __init__(self, stage, gpus):
        self.stage, self.gpus, self.admitted, self._said = stage, gpus, set(), {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self):
        self._stop.set()
        self._thread.join(20)

    def _run(self):
        while not self._stop.wait(0.5):
            with contextlib.suppress(CommandFailed):
                jobs = [it for it in self.stage.items("jobs") if LABEL_QUEUE in it["metadata"].get("labels", {})]
                jobs.sort(key=lambda it: (it["metadata"]["creationTimestamp"], it["metadata"]["name"]))
                self.admitted &= {it["metadata"]["uid"] for it in jobs}
                for job in jobs:
                    self._sync(job, jobs)

    def _sync(self, job, jobs):
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        kinds = {it["type"] for it in job.get("status", {}).get("conditions", ()) if it["status"] == "True"}
        if kinds & {"Complete", "Failed"}:
            self.admitted.discard(uid)
            return
        used = sum(gpus_of(it) for it in jobs if it["metadata"]["uid"] in self.admitted)
        if uid not in self.admitted and used + gpus_of(job) <= self.gpus:
            self.admitted.add(uid)
        self._say(job)
        if job["spec"]["suspend"] == (uid in self.admitted):
            change = {"spec": {"suspend": uid not in self.admitted}}
            self.stage.kubectl("patch", "job", name, "--type=merge", "-p", json.dumps(change))

    def _say(self, job):
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        admitted = uid in self.admitted
        reserved = {"type": "QuotaReserved", "status": "True" if admitted else "False", "reason": "Pending"}
        reserved |= {"message": "Quota reserved" if admitted else WORDS}
        if self._said.get(uid) == reserved:
            return
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid, "controller": True}
        meta = {"name": f"job-{name}", "labels": {LABEL_WORKLOAD_JOB: uid}, "ownerReferences": [owner]}
        body = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload", "metadata": meta}
        self.stage.apply(body | {"status": {"conditions": [reserved]}})
        self._said[uid] = reserved


def gpus_of(job):
    box = job["spec"]["template"]["spec"]["containers"][0]
    return job["spec"]["parallelism"] * int(box["resources"]["limits"].get("nvidia.com/gpu", 0))


@pytest.fixture
def gpus(stage):
    """Eight GPUs on the imaginary node, and Workloads."""

    def have(amount):
        status = json.dumps(
            {"status": {"capacity": {"nvidia.com/gpu": amount}, "allocatable": {"nvidia.com/gpu": amount}}}
        )
        stage.cluster.kubectl("patch", "node", NODE, "--subresource=status", "--type=merge", "-p", status)

    have("8")
    stage.apply(WORKLOAD_CRD)
    stage.cluster.kubectl("wait", "--for=condition=Established", "crd/workloads.kueue.x-k8s.io", "--timeout=20s")
    yield
    stage.cluster.kubectl("delete", "crd", "workloads.kueue.x-k8s.io", "--wait=false")
    have(None)


@pytest.fixture
def kueue(stage, gpus):
    """One LocalQueue with a quota of eight GPUs."""
    actor = Kueue(stage, 8)
    yield actor
    actor.close()


def job(stage, name="sentiment", queue="", **spec):
    raw = make.finetunejob(name, stage.namespace, **spec)
    folders = {"checkpoint": {"uri": f"s3://checkpoints/{name}"}, "output": {"uri": f"s3://models/{name}"}}
    raw["spec"] = make.merged(raw["spec"], folders)
    raw["metadata"]["labels"] = {LABEL_QUEUE: queue} if queue else {}
    return raw


FIVE = {"workers": {"replicas": 5, "gpusPerWorker": 1}}


def pods_of(stage, name):
    return stage.items("pods", f"tunesmith.dev/finetunejob={name}")


def workers(stage, name):
    return stage.get("ftj", name).get("status", {}).get("display", {}).get("workers")


def first_ends(pod):
    return ended(pod, 0, make.succeeded()) if pod["metadata"]["name"].startswith("first-") else running(pod)


def edit(stage, name, **spec):
    stage.kubectl("patch", "ftj", name, "--type=merge", "-p", json.dumps({"spec": spec}))


def patched_jobs(stage, since):
    return [it for it in stage.operator.writes(since, stage.namespace) if it.startswith("patch jobs")]


def test_of_two_jobs_that_need_five_of_eight_gpus_the_second_waits_in_the_queue(stage, kueue, record_property):
    begun = datetime.now(UTC)
    stage.apply(job(stage, "first", "gpus", **FIVE))
    stage.wait("the first one's pods", lambda: len(pods_of(stage, "first")) == 5)
    since = datetime.now(UTC)
    stage.apply(job(stage, "second", "gpus", **FIVE))
    message = stage.wait_condition("ftj", "second", "Succeeded", "Unknown", "QuotaPending")
    assert "queue gpus" in message
    stage.wait("Kueue's words", lambda: WORDS in stage.condition("ftj", "second", "Succeeded")[2])
    assert pods_of(stage, "second") == []
    assert stage.get("ftj", "second")["status"]["phase"] == "Pending"
    time.sleep(20)
    written = [it for it in stage.operator.writes(since, stage.namespace) if "second" in it or "events" in it]
    waited = [it for it in written if not it.startswith("create") or "events" in it]
    record_property("writes", len(waited))
    assert len(waited) <= 3, waited
    stage.kubelet.script = first_ends
    stage.wait_condition("ftj", "first", "Succeeded", "True", "Completed", 40)
    stage.wait("the second one's pods", lambda: len(pods_of(stage, "second")) == 5, 40)
    assert patched_jobs(stage, begun) == [], "suspend is Kueue's"


def test_suspending_a_queued_job_gives_its_quota_to_the_next_one(stage, kueue):
    since = datetime.now(UTC)
    stage.apply(job(stage, "first", "gpus", **FIVE))
    stage.wait("the first one's pods to run", lambda: workers(stage, "first") == "5/5")
    stage.apply(job(stage, "second", "gpus", **FIVE))
    stage.wait_condition("ftj", "second", "Succeeded", "Unknown", "QuotaPending")
    edit(stage, "first", suspend=True)
    stage.wait("the second one's pods", lambda: len(pods_of(stage, "second")) == 5)
    stage.wait_condition("ftj", "first", "Succeeded", "Unknown", "Suspended")
    assert pods_of(stage, "first") == []
    edit(stage, "first", suspend=False)
    stage.wait_condition("ftj", "first", "Succeeded", "Unknown", "QuotaPending")
    assert stage.get("ftj", "first")["status"]["restarts"] == 0
    assert stage.get("ftj", "first")["status"]["gpuSeconds"] > 0
    assert patched_jobs(stage, since) == []


def default_queue(namespace):
    """What Kueue's webhook does to a new Job where there is a LocalQueue named default."""
    name = f"queue-{namespace}"
    change = (
        f'Object{{metadata: Object.metadata{{labels: {{"{LABEL_QUEUE}": "default"}}}}, '
        "spec: Object.spec{suspend: true}}"
    )
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    spec = {
        "matchConstraints": {
            "resourceRules": [rule],
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        },
        "reinvocationPolicy": "Never",
        "failurePolicy": "Fail",
        "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": change}}],
    }
    api = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": name}}
    yield {**api, "kind": "MutatingAdmissionPolicy", "spec": spec}
    yield {**api, "kind": "MutatingAdmissionPolicyBinding", "spec": {"policyName": name}}


def test_in_a_namespace_with_a_default_queue_nobody_fights_over_suspend(stage, kueue):
    policy = list(default_queue(stage.namespace))
    try:
        stage.apply(*policy)
        probe = ("create", "job", "probe", "--image=x", "--dry-run=server", "-o", "json")
        stage.wait("the policy to be taken up", lambda: LABEL_QUEUE in stage.kubectl(*probe))
        kueue.gpus = 4
        since = datetime.now(UTC)
        stage.apply(job(stage, **FIVE))
        message = stage.wait_condition("ftj", "sentiment", "Succeeded", "Unknown", "QuotaPending")
        assert "queue default" in message
        stage.operator.kill()
        stage.operator.start()
        time.sleep(10)
        assert stage.get("job", "sentiment-1")["spec"]["suspend"] is True
        kueue.gpus = 8
        stage.wait("its pods", lambda: len(pods_of(stage, "sentiment")) == 5)
        time.sleep(2)
        assert stage.get("job", "sentiment-1")["spec"]["suspend"] is False
        assert patched_jobs(stage, since) == []
    finally:
        for body in policy:
            stage.cluster.kubectl("delete", body["kind"], body["metadata"]["name"], "--ignore-not-found")


def test_a_used_up_budget_ends_the_job_and_an_operator_that_starts_anew_counts_on(stage, gpus):
    stage.apply(job(stage, workers={"gpusPerWorker": 1}, budget={"maxGpuSeconds": 40}))
    stage.wait("two pods that run", lambda: workers(stage, "sentiment") == "2/2")
    time.sleep(2)
    stage.operator.kill()
    time.sleep(4)
    stage.operator.start()
    message = stage.wait_condition("ftj", "sentiment", "Succeeded", "False", "BudgetExceeded", 60)
    assert "budget.maxGpuSeconds: 40" in message
    status = stage.get("ftj", "sentiment")["status"]
    assert status["gpuSeconds"] >= 40
    assert status["phase"] == "Failed"
    stage.wait("its pods to go", lambda: not pods_of(stage, "sentiment"))
    stage.wait("its Job to go", lambda: not stage.get("job", "sentiment-1"))
    time.sleep(2)
    assert stage.get("ftj", "sentiment")["status"] == status


def test_the_children_go_and_the_object_stays(stage):
    stage.kubelet.script = lambda pod: ended(pod, 0, make.succeeded())
    stage.apply(job(stage, childrenTTLSecondsAfterFinished=0))
    stage.wait_condition("ftj", "sentiment", "Succeeded", "True", "Completed")
    stage.wait("the Job to go", lambda: not stage.items("jobs,pods"))
    stage.wait("the plan to go", lambda: not stage.items("cm", "tunesmith.dev/finetunejob=sentiment"))
    since = datetime.now(UTC)
    time.sleep(6)
    assert stage.operator.writes(since, stage.namespace) == []
    assert stage.get("ftj", "sentiment")["status"]["phase"] == "Succeeded"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"budget": {"maxGpuSeconds": 30}}, "set workers.gpusPerWorker"),
        ({"budget": {"maxGpuSeconds": 0}, "workers": {"gpusPerWorker": 1}}, "spec.budget.maxGpuSeconds"),
        ({"childrenTTLSecondsAfterFinished": 9, "ttlSecondsAfterFinished": 8}, "must not be longer than"),
        ({"workers": {"podTemplate": {"labels": {LABEL_QUEUE: "gpus"}}}}, "belongs to the FineTuneJob itself"),
    ],
)
def test_limits_that_cannot_hold_are_refused_at_admission(stage, spec, message):
    with pytest.raises(CommandFailed, match=message):
        stage.apply(job(stage, **spec))


def test_a_label_that_names_no_queue_is_refused_with_the_command_that_lists_them(stage):
    stage.apply(job(stage, queue="My_Queue"))
    message = stage.wait_condition("ftj", "sentiment", "Succeeded", "False", "InvalidSpec")
    assert f"kubectl get localqueues -n {stage.namespace}" in message


def test_a_corrected_label_moves_the_waiting_job_to_that_queue(stage):
    stage.apply(job(stage, queue="gpsu"))
    stage.wait("the Job", lambda: stage.get("job", "sentiment-1"))
    stage.wait_condition("ftj", "sentiment", "Succeeded", "Unknown", "QuotaPending")
    stage.kubectl("label", "ftj", "sentiment", "--overwrite", f"{LABEL_QUEUE}=gpus")
    stage.wait("its new queue", lambda: stage.get("job", "sentiment-1")["metadata"]["labels"][LABEL_QUEUE] == "gpus")
    assert stage.get("job", "sentiment-1")["spec"]["suspend"] is True
    stage.wait("the message", lambda: "queue gpus" in stage.condition("ftj", "sentiment", "Succeeded")[2], 40)
