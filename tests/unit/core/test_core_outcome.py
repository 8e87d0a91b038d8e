"""How a Job ended: the controller's verdict, in the words of the pod that decided it."""

from dataclasses import replace

import pytest

from support import make
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.reports import MemoryFacts
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_operator.core.finetunejob.observed import Observed, children_of
from tunesmith_operator.core.finetunejob.outcome import verdict
from tunesmith_operator.core.kubernetes.workloads import JobView
from tunesmith_operator.core.pods.view import PodView
from tunesmith_operator.core.reconcile.observed import ObservedObjects


def job(*conditions):
    meta = {"name": "sentiment-1", "namespace": "ml", "uid": "j", "ownerReferences": [{"uid": "u", "controller": True}]}
    entries = [
        {"type": type_, "status": "True", "reason": reason, "message": message, "lastTransitionTime": make.stamp(9)}
        for type_, reason, message in conditions
    ]
    return JobView.of({"metadata": meta, "status": {"conditions": entries}})


def pod(index, code=None, message="", reason="Error", ended=5.0, phase=None, created=0.0, ready=None):
    state = {"running": {}} if code is None else {
        "terminated": {"exitCode": code, "message": message, "reason": reason, "finishedAt": make.stamp(ended)}
    }  # fmt: skip
    phase = phase or ("Running" if code is None else "Succeeded" if code == 0 else "Failed")
    meta = {
        "name": f"sentiment-1-{index}-x", "namespace": "ml", "uid": f"p{index}",
        "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
        "ownerReferences": [{"uid": "j", "controller": True}], "creationTimestamp": make.stamp(created),
    }  # fmt: skip
    conditions = [{"type": "Ready", "status": "True", "lastTransitionTime": make.stamp(ready)}] if ready else []
    containers = [{"name": "trainer", "state": state}]
    return PodView.of(
        {"metadata": meta, "status": {"phase": phase, "containerStatuses": containers, "conditions": conditions}}
    )


def judged(child, *pods, **spec):
    raw = make.finetunejob(**spec)
    raw["metadata"]["uid"] = "u"
    bounds = FineTuneJob.model_validate(raw).spec
    child = replace(
        child,
        backoff_limit=bounds.failure_policy.backoff_limit,
        active_deadline_seconds=bounds.active_deadline_seconds,
    )
    observed = Observed(job=FineTuneJob.model_validate(raw), objects=ObservedObjects(jobs=(child,), pods=pods))
    return verdict(children_of(observed), observed.job.spec)


COMPLETE = ("Complete", "SuccessPolicy", "")
POLICY = ("FailureTarget", "PodFailurePolicy", "")
BACKOFF = ("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")


def test_a_job_without_a_verdict_has_none():
    assert judged(job(), pod(0), pod(1)) is None


def test_success_is_told_as_soon_as_it_is_certain_and_explained():
    done = pod(0, 0, make.succeeded().to_json())
    assert judged(job(), done) is None, "the Job controller has the last word"
    found = judged(job(("SuccessCriteriaMet", "SuccessPolicy", "")), done, pod(1))
    assert found.succeeded
    assert found.report.model.digest == make.DIGEST


def test_success_whose_report_is_gone_is_still_success():
    assert judged(job(("SuccessCriteriaMet", "SuccessPolicy", "")), pod(1)) is None
    found = judged(job(COMPLETE))
    assert found.succeeded
    assert "output.uri" in found.message


def test_a_complete_job_whose_worker_0_still_seems_to_run_is_waited_for_as_its_report_is_on_its_way():
    assert judged(job(COMPLETE), pod(0), pod(1)) is None


@pytest.mark.parametrize("phase", ["Running", "Succeeded"])
def test_a_container_that_has_ended_counts_before_the_pods_phase_says_so(phase):
    ended = pod(0, 0, make.succeeded().to_json(), phase=phase)
    assert judged(job(("SuccessCriteriaMet", "SuccessPolicy", "")), ended).report.model.digest == make.DIGEST
    failed = pod(1, 40, make.failed().to_json(), phase="Running" if phase == "Running" else "Failed")
    assert judged(job(POLICY), pod(0), failed).reason == Reason.DATASET_INVALID


def test_a_users_error_is_told_in_the_trainers_words_by_whichever_worker_it_was():
    found = judged(job(POLICY), pod(0), pod(1, 40, make.failed().to_json()))
    assert (found.succeeded, found.reason) == (False, Reason.DATASET_INVALID)
    assert "line 3" in found.message
    assert "worker 1" in found.message
    assert "kubectl logs -n ml sentiment-1-1-x" in found.message


def test_of_several_errors_the_first_counts():
    late = pod(0, 43, make.failed(Reason.DIVERGED).to_json(), ended=7)
    early = pod(1, 41, make.failed(Reason.STORAGE_UNWRITABLE).to_json(), ended=6)
    assert judged(job(POLICY), late, early).reason == Reason.STORAGE_UNWRITABLE


@pytest.mark.parametrize(
    ("code", "reason"), [(40, "InvalidSpec"), (41, "StorageUnreadable"), (42, "OutOfMemory"), (43, "Diverged")]
)
def test_an_exit_code_without_a_report_still_has_its_meaning(code, reason):
    found = judged(job(POLICY), pod(0, code, "Traceback\nBoom"))
    assert found.reason == reason
    assert "Boom" in found.message


def test_failure_without_an_explanation_waits_until_the_pods_have_ended():
    assert judged(job(("FailureTarget", "BackoffLimitExceeded", "")), pod(0)) is None


def test_crashes_beyond_the_limit_name_the_first_of_those_that_came_together_its_code_and_its_log():
    found = judged(
        job(BACKOFF),
        pod(0, 1, "connection reset by peer", ended=8),
        pod(1, 139, "starting\nSegmentation fault", ended=3),
        pod(2, 1, "connection reset by peer", ended=9),
    )
    assert found.reason == Reason.BACKOFF_LIMIT_EXCEEDED
    first = "pod sentiment-1-1-x failed first, 2 more after it: exit code 139"
    for word in ("3 retries", first, "Segmentation fault", "kubectl logs -n ml sentiment-1-1-x"):
        assert word in found.message


APART = {
    "it had not been made when the other failed": (pod(1, 139, ended=3), pod(0, 1, ended=8, created=4)),
    "the same worker failed again": (pod(0, 139, ended=3), pod(0, 1, ended=8)),
    "the other had been replaced, and all were ready again": (pod(1, 139, ended=3), pod(1, ready=5, created=4), pod(0, 1, ended=8)),
    "much later": (pod(1, 139, ended=3), pod(0, 1, ended=1000)),
}  # fmt: skip


@pytest.mark.parametrize("case", APART)
def test_a_failure_with_a_cause_of_its_own_is_told_though_another_failed_before(case):
    found = judged(job(BACKOFF), *APART[case])
    assert "pod sentiment-1-0-x failed: exit code 1." in found.message


def test_a_store_that_was_never_reached_is_the_reason_that_a_job_was_given_up_for():
    left = make.failed(Reason.STORAGE_UNREACHABLE, message="can't list s3://data: no route to http://s3:1")
    found = judged(job(BACKOFF), pod(0, 1, left.to_json(), ended=8), failurePolicy={"backoffLimit": 0})
    assert found.reason == Reason.STORAGE_UNREACHABLE
    assert "no route to http://s3:1" in found.message


def test_a_pod_killed_for_memory_is_told_so_with_the_remedy():
    found = judged(job(BACKOFF), pod(1, 137, "", reason="OOMKilled"))
    assert found.reason == Reason.OUT_OF_MEMORY
    assert "workers.resources.memory (1Gi)" in found.message


HUNG = make.failed(Reason.COLLECTIVE_TIMEOUT, message="worker 1 didn't take part for 600 s").to_json()


@pytest.mark.parametrize("left", [HUNG, ""], ids=["with a report", "without"])
def test_a_worker_that_hangs_again_and_again_is_named(left):
    found = judged(job(BACKOFF), pod(0, ExitCode.COLLECTIVE_TIMEOUT, left), failurePolicy={"backoffLimit": 2})
    assert found.reason == Reason.COLLECTIVE_TIMEOUT
    assert "gave up after 2 retries" in found.message
    assert ("worker 1 didn't take part" in found.message) == bool(left)
    assert "kubectl logs -n ml sentiment-1-0-x" in found.message


def test_a_hang_alone_does_not_end_a_job():
    assert judged(job(), pod(0, ExitCode.COLLECTIVE_TIMEOUT, HUNG), pod(1)) is None


@pytest.mark.parametrize(("limit", "words"), [(16 * 2**30, "peak 15.5 GiB of 16.0 GiB]"), (0, "peak 15.5 GiB]")])
def test_memory_that_ran_out_is_told_with_the_numbers_for_a_smaller_micro_batch(limit, words):
    facts = MemoryFacts(micro_batch_size=8, peak_bytes=31 * 2**29, limit_bytes=limit)
    left = make.failed(Reason.OUT_OF_MEMORY, message="halve it", memory=facts)
    found = judged(job(POLICY), pod(0, ExitCode.OUT_OF_MEMORY, left.to_json()))
    assert found.reason == Reason.OUT_OF_MEMORY
    assert "halve it [microBatchSize 8, " + words in found.message


def test_a_deadline_tells_how_to_go_on():
    found = judged(job(("Failed", "DeadlineExceeded", "")), pod(0, 75, ""), activeDeadlineSeconds=3600)
    assert found.reason == Reason.DEADLINE_EXCEEDED
    assert "activeDeadlineSeconds (1h)" in found.message


def test_a_report_that_is_none_is_treated_as_log():
    found = judged(job(BACKOFF), pod(0, 1, '{"not": "a report"}'))
    assert found.reason == Reason.BACKOFF_LIMIT_EXCEEDED
    assert "exit code 1" in found.message
