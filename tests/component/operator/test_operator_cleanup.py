"""What Kubernetes clears away by itself is no loss: after a success, a failure, a suspension, and while the operator starts.

Every test is a sequence of states as the watches deliver them, each of them looked at twice.
"""

import pytest

from support import make
from support.world import World
from tunesmith_api.keys import FINETUNEJOB_KIND, Reason
from tunesmith_api.reports import CheckpointRef, ProgressReport, TrainerState
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.reconcile.progress import ProgressSample

KEY = Key(FINETUNEJOB_KIND, "ml", "sentiment")
JOB = "sentiment-1"
CHECKPOINT = CheckpointRef(step=80, uri="s3://checkpoints/sentiment/step-00000080")


class Run:
    """A job that trains, and all that its status has said since."""

    def __init__(self) -> None:
        self.world = World()
        self.world.cluster.put(make.finetunejob())
        self.world.reconcile()
        self.head, self.other = self.world.pod(JOB, 0, ready=True), self.world.pod(JOB, 1, ready=True)
        self.world.wait(20)
        self.report()
        self.look()
        self.phases: list[str] = []

    def report(self, state: TrainerState = TrainerState.TRAINING, **values) -> None:
        uid = self.world.cluster.get("Pod", self.head)["metadata"]["uid"]
        values = {"global_step": 80, "max_steps": 80, "checkpoint": CHECKPOINT, **values}
        now = self.world.now
        self.world.samples[KEY] = ProgressSample(
            uid, ProgressReport(state=state, heartbeat_unix=now.timestamp(), **values), now
        )

    def look(self, seconds: float = 1.0) -> None:
        """Two rounds: in the second the poller has let go of a pod that doesn't run any more."""
        for _ in range(2):
            self.world.wait(seconds)
            if self.world.controller._poller._targets.get(KEY) is None:
                self.world.samples.pop(KEY, None)
        if hasattr(self, "phases"):
            self.phases.append(self.world.status()["phase"])

    def reasons(self) -> list[str]:
        return [reason for _, reason in self.world.cluster.events]


def exits_well(run):
    run.world.exits(run.head, 0, make.succeeded(80))


def head_succeeds(run):
    run.world.ends(run.head, 0, make.succeeded(80))


def others_are_deleted(run):
    run.world.terminates(run.other)


def others_end(run):
    run.world.ends(run.other, 75, make.failed(Reason.INTERRUPTED))


def others_are_gone(run):
    run.world.cluster.remove("Pod", "ml", run.other)


def criteria_met(run):
    run.world.job_is(JOB, "SuccessCriteriaMet", "SuccessPolicy")


def complete(run):
    run.world.job_is(JOB, "Complete", "SuccessPolicy")


def time_passes(run):
    run.world.wait(11)


SUCCESSES = {
    "as a rule": (exits_well, head_succeeds, others_are_deleted, criteria_met, others_end, others_are_gone, complete),
    "the Job is heard of first": (exits_well, criteria_met, head_succeeds, others_are_deleted, others_end, complete),
    "its verdict is late": (exits_well, time_passes, head_succeeds, others_are_deleted, time_passes, others_end, others_are_gone, criteria_met),
    "nothing is heard of the pods until all is over": (others_are_deleted, criteria_met, others_end, complete, exits_well, head_succeeds),
    "the other worker ends before the first": (others_are_deleted, others_end, exits_well, head_succeeds, criteria_met, complete),
}  # fmt: skip


@pytest.mark.parametrize("case", SUCCESSES)
def test_the_clean_up_after_a_success_is_no_loss(case):
    run = Run()
    for happens in SUCCESSES[case]:
        happens(run)
        run.look()
    assert run.reasons() == ["Completed"]
    assert set(run.phases) <= {"Training", "Saving", "Succeeded"}
    status = run.world.status()
    assert status["restarts"] == 0
    assert status["model"]["digest"] == make.DIGEST


def given_up(run):
    run.report(TrainerState.FAILED, message="the loss is not finite")


def exits_badly(run):
    run.world.exits(run.head, 43, make.failed(Reason.DIVERGED))


def head_fails(run):
    run.world.ends(run.head, 43, make.failed(Reason.DIVERGED))


def job_fails(run):
    run.world.job_is(JOB, "FailureTarget", "PodFailurePolicy", "Container trainer failed with exit code 43")


FAILURES = {
    "as a rule": (given_up, exits_badly, head_fails, job_fails, others_are_deleted, others_end),
    "the Job is heard of first": (given_up, job_fails, others_are_deleted, exits_badly, head_fails),
    "its verdict is late": (exits_badly, head_fails, time_passes, others_are_deleted, others_end, job_fails),
}


@pytest.mark.parametrize("case", FAILURES)
def test_the_clean_up_after_a_failure_is_no_loss(case):
    run = Run()
    for happens in FAILURES[case]:
        happens(run)
        run.look()
    assert run.reasons() == ["Diverged"]
    assert set(run.phases) <= {"Training", "Failed"}
    assert run.world.status()["restarts"] == 0


def test_a_worker_that_is_stopped_since_another_failed_is_not_counted_as_restarted():
    run = Run()
    run.world.terminates(run.head)
    run.world.ends(run.head, 75, make.failed(Reason.INTERRUPTED))
    run.world.ends(run.other, 40, make.failed())
    job_fails(run)
    run.look()
    assert run.world.condition("Succeeded")[:2] == ("False", "DatasetInvalid")
    assert run.world.status()["restarts"] == 0


def suspend(run, value=True):
    run.world.cluster.change(FINETUNEJOB_KIND, "sentiment", {"spec": {"suspend": value}})
    run.look()


def suspended(run):
    """Suspend, and let the Job controller and the kubelets do their part but for the removal of worker 0's pod."""
    suspend(run)
    run.world.job_is(JOB, "Suspended", "JobSuspended")
    for pod in (run.head, run.other):
        run.world.terminates(pod)
    run.look()
    run.world.ends(run.head, 75, make.failed(Reason.INTERRUPTED))
    others_are_gone(run)
    run.look()


def test_a_suspension_is_no_loss_when_it_begins_nor_when_it_ends():
    run = Run()
    suspended(run)
    assert run.world.status()["restarts"] == 0
    suspend(run, False)
    run.world.job_is(JOB, "Suspended", "JobResumed", status="False")
    run.look()
    run.world.cluster.remove("Pod", "ml", run.head)
    run.look()
    run.head, run.other = run.world.pod(JOB, 0, "b"), run.world.pod(JOB, 1, "b")
    run.look(6)
    assert run.phases[-1] == "Starting"
    run.report(TrainerState.STARTING, global_step=0, max_steps=0, checkpoint=None)
    run.look()
    run.report(TrainerState.PREPARING, max_steps=0, restarts=0, message="loading model and data")
    run.look()
    run.report()
    run.look()
    assert run.reasons() == ["Suspended"]
    assert run.world.status()["restarts"] == 0


def test_a_worker_that_is_lost_after_a_suspension_is_told():
    run = Run()
    suspended(run)
    run.world.cluster.remove("Pod", "ml", run.head)
    suspend(run, False)
    run.world.job_is(JOB, "Suspended", "JobResumed", status="False")
    run.head = run.world.pod(JOB, 0, "b")
    run.look()
    run.world.ends(run.head, 137)
    run.look()
    status, reason, message = run.world.condition("Succeeded")
    assert (status, reason) == ("Unknown", "Restarting")
    assert message.startswith("A worker was lost; training goes on from the checkpoint of step 80. Last: ")
    assert run.world.status()["restarts"] == 0, "nothing has been resumed yet"
    run.world.pod(JOB, 0, "c")
    run.look(6)
    assert run.world.status()["restarts"] == 1


def test_a_job_that_is_deleted_counts_once():
    run = Run()
    raw = run.world.cluster.get("Job", JOB)
    run.world.cluster.change("Job", JOB, {"metadata": {"deletionTimestamp": run.world.stamp()}})
    for pod in (run.head, run.other):
        run.world.terminates(pod)
    run.look()
    run.world.ends(run.head, 75, make.failed(Reason.INTERRUPTED))
    run.look()
    run.world.cluster.remove("Job", "ml", JOB)
    run.look()
    assert run.world.cluster.get("Job", JOB)["metadata"]["uid"] != raw["metadata"]["uid"]
    assert run.world.status()["restarts"] == 1


def test_an_operator_that_starts_takes_no_worker_for_lost_that_it_has_not_heard_yet():
    run = Run()
    sample = run.world.samples.pop(KEY)
    run.world._boot()
    run.world.wait(1)
    assert run.world.status()["phase"] == "Training"
    run.world.samples[KEY] = sample
    run.look()
    assert run.reasons() == []


def test_a_worker_that_took_the_place_of_another_is_a_loss_though_it_has_not_reported():
    run = Run()
    run.world.cluster.remove("Pod", "ml", run.head)
    run.world.samples.pop(KEY)
    run.head = run.world.pod(JOB, 0, "b")
    run.look()
    assert run.world.condition("Succeeded")[:2] == ("Unknown", "Restarting")
