"""GPU-seconds: what is counted of each pod, once, and when the budget is used up."""

from dataclasses import replace

import pytest

from support import make
from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_operator.core.finetunejob.observed import Children
from tunesmith_operator.core.finetunejob.usage import budget_end, budget_verdict, counted, gpu_seconds, over_budget
from tunesmith_operator.core.kubernetes.objects import ConditionView
from tunesmith_operator.core.kubernetes.workloads import JobView
from tunesmith_operator.core.pods.view import ContainerView, PodView
from tunesmith_operator.core.status.transitions import differs, is_urgent

CHILD = JobView(namespace="ml", name="sentiment-1", uid="j")


def job(status=None, gpus=1, budget=None):
    spec = {"workers": {"gpusPerWorker": gpus}} | ({"budget": {"maxGpuSeconds": budget}} if budget else {})
    return FineTuneJob.model_validate({**make.finetunejob(**spec), "status": status or {}})


def pod(index=0, scheduled=0.0, ended=None, code=75, **fields):
    container = ContainerView("trainer", running=True)
    if ended is not None:
        container = ContainerView("trainer", exit_code=code, ended_at=make.at(ended))
        fields = {"phase": "Succeeded" if code == 0 else "Failed", **fields}
    at = make.at(scheduled) if scheduled is not None else None
    return PodView(
        namespace="ml", name=f"p{index}", uid=f"p{index}", index=index, scheduled_at=at, container=container, **fields
    )


def children(*pods, child=CHILD, leaving=()):
    return Children(
        service=None, config_map=None, network_policy=None, job=child, pods=pods, orphans=(), rejections=(),
        progress=None, leaving=tuple(leaving),
    )  # fmt: skip


def test_a_pod_counts_from_its_node_to_its_end():
    assert gpu_seconds(job(), children(pod(scheduled=None)), make.at(50)) == 0, "no node, no GPU"
    assert gpu_seconds(job(), children(pod(scheduled=10)), make.at(50)) == 40
    assert gpu_seconds(job(), children(pod(0), pod(1, scheduled=20)), make.at(50)) == 50 + 30
    assert gpu_seconds(job(), children(pod(ended=30), pod(1)), make.at(50)) == 30 + 50
    assert gpu_seconds(job(), children(pod(deleting=True)), make.at(50)) == 50, "it saves a checkpoint"
    assert gpu_seconds(job(), children(leaving=[pod()], child=None), make.at(50)) == 50, "its Job is gone"


def test_every_gpu_of_a_pod_counts_and_a_job_without_any_counts_nothing():
    one = job()
    workers = one.spec.workers.model_copy(update={"gpus_per_worker": 8})
    eight = one.model_copy(update={"spec": one.spec.model_copy(update={"workers": workers})})
    assert gpu_seconds(eight, children(pod()), make.at(50)) == 400
    assert gpu_seconds(job(gpus=0), children(pod()), make.at(50)) is None
    status = job(gpus=0).status
    assert counted(status, job(gpus=0), children(pod()), make.at(50)) is status


def test_an_evicted_pod_that_left_no_time_of_its_end_counts_as_far_as_is_known():
    evicted = pod(phase="Failed")
    assert gpu_seconds(job({"gpuSeconds": 20, "gpuSecondsTime": make.stamp(20)}), children(evicted), make.at(50)) == 20


@pytest.mark.parametrize("written", [[50], [7, 20, 33, 50], [0.9, 12.2, 30.5, 30.9, 50.7]])
def test_however_often_the_status_is_written_the_sum_is_the_same(written):
    """An operator that starts anew begins from the status: that is all that one write knows of another."""
    pods, now = children(pod(ended=31.0), pod(1, scheduled=5)), job()
    for moment in written:
        status = counted(now.status, now, pods, make.at(moment))
        assert counted(now.status, now, pods, make.at(moment)) == status, "idempotent"
        now = now.model_copy(update={"status": status})
    assert now.status.gpu_seconds == 31 + 45
    assert now.status.gpu_seconds_time == make.stamp(50)


def test_a_pod_that_is_gone_stays_counted_and_a_clock_that_was_set_back_takes_nothing_away():
    known = job({"gpuSeconds": 300, "gpuSecondsTime": make.stamp(100)})
    assert gpu_seconds(known, children(), make.at(400)) == 300
    back = counted(known.status, known, children(pod()), make.at(40))
    assert (back.gpu_seconds, back.gpu_seconds_time) == (300, make.stamp(100))


def test_the_count_moves_with_other_writes_and_asks_for_none():
    before = job({"gpuSeconds": 300, "gpuSecondsTime": make.stamp(100)}).status
    after = before.model_copy(update={"gpu_seconds": 900, "gpu_seconds_time": make.stamp(400)})
    assert not differs(before, after)
    assert not is_urgent(before, after)
    assert differs(before, after.model_copy(update={"restarts": 1}))


def test_the_budget_is_over_when_it_is_used_up_and_that_moment_is_foreseen():
    limited, two = job(budget=100), children(pod(0), pod(1, scheduled=20))
    assert not over_budget(limited, two, make.at(59))
    assert over_budget(limited, two, make.at(60))
    assert budget_end(limited, two, make.at(30)) == make.at(60)
    assert budget_end(job(budget=101), two, make.at(30)) == make.at(61), "a part of a second is a whole one"
    assert budget_end(limited, two, make.at(60)) is None
    assert budget_end(limited, children(), make.at(30)) is None, "nobody uses any"
    assert budget_end(job(), two, make.at(30)) is None
    assert not over_budget(job(), two, make.at(10**6)), "no budget"


def test_a_job_that_is_ending_anyway_is_let_end():
    limited, late = job(budget=10), make.at(60)
    done = replace(CHILD, conditions=(ConditionView("SuccessCriteriaMet", "True"),))
    assert not over_budget(limited, children(pod(), child=done), late)
    assert not over_budget(limited, children(pod(ended=50, code=0), pod(1)), late)


def test_the_verdict_says_how_much_was_used_and_how_to_go_on():
    left = make.failed(Reason.INTERRUPTED, message="saved", global_step=7, max_steps=10).to_json()
    head = pod(ended=50)
    head = replace(head, container=replace(head.container, ended_message=left))
    found = budget_verdict(job(budget=10), children(head, pod(1, ended=55)), make.at(60))
    assert (found.succeeded, found.reason) == (False, Reason.BUDGET_EXCEEDED)
    assert "after 105 GPU-seconds (budget.maxGpuSeconds: 10)" in found.message
    assert "same checkpoint.uri" in found.message
    assert found.report.global_step == 7
