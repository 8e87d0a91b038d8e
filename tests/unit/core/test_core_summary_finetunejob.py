"""What a job that hasn't ended says first: a row for each rule, with the reason why there is one."""

from dataclasses import replace

import pytest

from support import make
from tunesmith_api.keys import Reason
from tunesmith_api.reports import ProgressReport, TrainerState
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_operator.core.finetunejob.children import ANNOTATION_RESTARTS_BEFORE
from tunesmith_operator.core.finetunejob.observed import Children
from tunesmith_operator.core.finetunejob.summary import RULES, Situation, summarize
from tunesmith_operator.core.kubernetes.objects import ConditionView
from tunesmith_operator.core.kubernetes.workloads import JobView
from tunesmith_operator.core.pods.startup import StartupProblem
from tunesmith_operator.core.pods.view import ContainerView, PodView
from tunesmith_operator.core.reconcile.progress import ProgressSample

TRAINED = {
    "phase": "Training",
    "progress": {"globalStep": 6, "maxSteps": 10, "lastHeartbeatTime": make.stamp(100)},
    "checkpoint": {"step": 5, "uri": "s3://checkpoints/sentiment/step-00000005"},
    "conditions": [
        {"type": "Succeeded", "status": "Unknown", "reason": "Training", "message": "step 6", "lastTransitionTime": make.stamp()}
    ],
}  # fmt: skip
CHILD = JobView(namespace="ml", name="sentiment-1", uid="j")
AGAIN = replace(CHILD, created=make.at(150), annotations={ANNOTATION_RESTARTS_BEFORE: "1"})
HELD_UP = {
    "phase": "Starting",
    "conditions": [
        {"type": "Succeeded", "status": "Unknown", "reason": "StorageUnreachable", "message": "can't list", "lastTransitionTime": make.stamp()}
    ],
}  # fmt: skip
NO_CHILDREN = Children(
    service=None, config_map=None, network_policy=None, job=None, pods=(), orphans=(), rejections=(), progress=None
)


def pod(index=0, code=None, phase=None, created=0.0, **fields):
    """A pod that runs, or whose container has ended with that code."""
    container = ContainerView("trainer", running=code is None, exit_code=code, ended_at=make.at(120))
    phase = phase or ("Running" if code is None else "Succeeded" if code == 0 else "Failed")
    return PodView(
        namespace="ml", name=f"p{index}", uid=f"p{index}", index=index, phase=phase, container=container,
        created=make.at(created), **fields,
    )  # fmt: skip


def stopped(created=0.0):
    """A pod whose container runs no more, without an exit code yet."""
    running = pod(created=created)
    return replace(running, container=replace(running.container, running=False, ended_at=None))


def gave_up():
    """A pod that reached no store."""
    left = make.failed(Reason.STORAGE_UNREACHABLE, message="can't list s3://data").to_json()
    crashed = pod(code=1)
    return replace(crashed, name="p0-first", container=replace(crashed.container, ended_message=left))


def said(state, **values):
    """The trainer's report, just now."""
    return ProgressSample("p0", ProgressReport(state=state, **values), make.at(199))


def condition(type_, reason="", status="True", at=0.0):
    return ConditionView(type_, status, reason, "as the Job controller says", make.at(at))


def situation(*pods, job=CHILD, status=None, conditions=(), sample=None, problem=None, restarts=0, spec=None):
    child = replace(job, conditions=tuple(conditions)) if job is not None else None
    return Situation(
        job=FineTuneJob.model_validate({**make.finetunejob(**(spec or {})), "status": TRAINED if status is None else status}),
        children=replace(NO_CHILDREN, job=child, pods=tuple(pods), progress=sample),
        problem=problem, restarts=restarts, now=make.at(200), config=make.CONFIG,
    )  # fmt: skip


EXIT_CODE = condition("FailureTarget", "PodFailurePolicy")
RESUMED = condition("Suspended", "JobResumed", status="False", at=150)
GPUS = {"workers": {"gpusPerWorker": 1}, "budget": {"maxGpuSeconds": 100}}
TABLE = [
    ("not_created", "nothing can be said of pods before there is a Job", situation(job=None, status={}), "Pending", "Pending"),
    ("budget_exceeded", "its workers are being stopped, which is no loss and nobody's suspension", situation(pod(scheduled_at=make.at(0)), pod(1, code=75, scheduled_at=make.at(0)), job=replace(CHILD, suspended=True), spec=GPUS), "Training", "BudgetExceeded"),
    ("waits_for_quota", "Kueue has suspended it, and spec.suspend would not help", situation(job=replace(CHILD, suspended=True, queue="gpus"), problem=StartupProblem(Reason.QUOTA_PENDING, "waits", None)), "Pending", "QuotaPending"),
    ("suspended", "a suspension deletes the Job that Kueue would start again", situation(job=None, status={**TRAINED, "attempts": [{"number": 1, "jobName": "sentiment-1"}]}, spec={"suspend": True}), "Suspended", "Suspended"),
    ("not_created", "after such a suspension nothing was lost", situation(job=None, status={**TRAINED, "attempts": [{"number": 1, "jobName": "sentiment-1", "outcome": "Suspended"}]}), "Pending", "Pending"),
    ("starting", "the Job that a suspension made again", situation(pod(created=160), job=AGAIN, conditions=[RESUMED], restarts=1), "Starting", "Starting"),
    ("suspended", "the pods that a suspension stops fail, and are no loss", situation(pod(code=75), job=replace(CHILD, suspended=True)), "Suspended", "Suspended"),
    ("suspended", "the Job controller has not got to it yet", situation(pod(), spec={"suspend": True}), "Suspended", "Suspended"),
    ("failing", "retries are used up, and the other workers are being stopped", situation(pod(), conditions=[condition("FailureTarget", "BackoffLimitExceeded")]), "Training", "BackoffLimitExceeded"),
    ("failing", "time is up", situation(pod(), conditions=[condition("FailureTarget", "DeadlineExceeded")]), "Training", "DeadlineExceeded"),
    ("failing", "a first status has to say something", situation(pod(), status={}, conditions=[EXIT_CODE]), "Pending", "BackoffLimitExceeded"),
    ("cannot_start", "one pod that can't start holds up all", situation(pod(), problem=StartupProblem(Reason.SECRET_NOT_FOUND, "no Secret", None)), "Pending", "SecretNotFound"),
    ("succeeding", "the success policy deletes the other workers' pods", situation(pod(code=0), pod(1, code=75, deleting=True)), "Saving", "Training"),
    ("succeeding", "a container ends before the kubelet moves its pod's phase", situation(pod(code=0, phase="Running")), "Saving", "Training"),
    ("succeeding", "the Job is heard of before its pod", situation(pod(), conditions=[condition("SuccessCriteriaMet")]), "Saving", "Training"),
    ("verdict_pending", "the exit code ends the job, the Job controller is about to say so", situation(pod(code=40)), "Training", "Training"),
    ("verdict_pending", "an exit code has ended the job, the pod is yet to be heard of", situation(pod(), conditions=[EXIT_CODE]), "Training", "Training"),
    ("verdict_pending", "a trainer that has given up is about to exit, with a code that says more", situation(pod(), sample=said(TrainerState.FAILED)), "Training", "Training"),
    ("report_pending", "an operator that has just started has no report yet", situation(pod(created=50)), "Training", "Training"),
    ("report_pending", "the container has stopped, and the kubelet is yet to say how", situation(stopped(created=50)), "Training", "Training"),
    ("held_up", "no store can be reached, and nothing was lost", situation(pod(), status={}, sample=said(TrainerState.STARTING, restarts=1, reason="StorageUnreachable", message="can't list")), "Starting", "StorageUnreachable"),
    ("held_up", "it tries again: the cause would else come and go with each try", situation(pod(), status=HELD_UP, sample=said(TrainerState.PREPARING, restarts=2, reason="StorageUnreachable")), "Starting", "StorageUnreachable"),
    ("held_up", "one pod has given up, and another tries", situation(gave_up(), pod(created=130), status={}), "Starting", "StorageUnreachable"),
    ("worker_lost", "a reason that this version doesn't know", situation(pod(), sample=said(TrainerState.STARTING, restarts=1, reason="MoonInTheWay")), "Starting", "Restarting"),
    ("reported", "the trainer knows best", situation(pod(), sample=said(TrainerState.EVALUATING)), "Evaluating", "Training"),
    ("reported", "preparing again after a loss", situation(pod(), sample=said(TrainerState.PREPARING, restarts=1)), "Starting", "Restarting"),
    ("reported", "preparing again after a suspension, which the trainer counts, too", situation(pod(), sample=said(TrainerState.PREPARING, restarts=1), conditions=[RESUMED]), "Starting", "Starting"),
    ("worker_lost", "a pod has failed in a way that is retried", situation(pod(code=137), status={}), "Starting", "Restarting"),
    ("worker_lost", "its container is enough of a sign", situation(pod(code=1, phase="Running"), status={}), "Starting", "Restarting"),
    ("worker_lost", "another pod has taken the place of the one that reported", situation(pod(created=110)), "Starting", "Restarting"),
    ("worker_lost", "the trainer starts anew inside its pod", situation(pod(), sample=said(TrainerState.STARTING)), "Starting", "Restarting"),
    ("reported", "it counts the restarts of an earlier job with the same checkpoints", situation(pod(), status={}, sample=said(TrainerState.PREPARING, restarts=1), restarts=1), "Starting", "Starting"),
    ("not_created", "somebody has deleted the Job", situation(job=None, status={**TRAINED, "attempts": [{"number": 1, "jobName": "sentiment-1"}]}, restarts=1), "Starting", "JobDeleted"),
    ("job_deleted", "the Job that takes its place has not been heard of", situation(pod(created=160), job=AGAIN, restarts=1), "Starting", "JobDeleted"),
    ("job_deleted", "somebody deletes the Job, and its pods with it", situation(pod(code=75, deleting=True), job=replace(CHILD, deleting=True)), "Starting", "JobDeleted"),
    ("worker_lost", "a pod of the Job that takes its place fails", situation(pod(code=137, created=160), job=AGAIN, restarts=1), "Starting", "Restarting"),
    ("starting", "a container runs and nothing has been heard of it", situation(pod(), status={}), "Starting", "Starting"),
    ("starting", "after a suspension training goes on, and nothing was lost", situation(pod(created=160), conditions=[RESUMED], restarts=1), "Starting", "Starting"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "why", "seen", "phase", "reason"), TABLE, ids=[row[1] for row in TABLE])
def test_the_first_rule_that_applies_is_what_people_see(rule, why, seen, phase, reason):
    assert next(it.__name__ for it in RULES if it(seen) is not None) == rule
    summary = summarize(seen)
    assert (summary.phase, summary.reason) == (phase, reason)
    assert summary.message


def test_without_any_rule_the_pods_are_waited_for():
    assert summarize(situation(status={})).reason == Reason.PENDING


def test_every_rule_has_a_row():
    assert {row[0] for row in TABLE} == {rule.__name__ for rule in RULES}
