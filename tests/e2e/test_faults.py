"""What dies during training: a rank, a pod, the operator, the namespace. No step is lost, and none is counted twice."""

import os
import signal

from testbed import Testbed
from testbed.bed import OPERATOR_NAMESPACE
from testbed.jobs import describe, fine_tune_job, history, wait_finished, wait_for_step

STEPS = list(range(1, 13))


def finish(testbed: Testbed, name: str, namespace: str) -> dict:
    status = wait_finished(testbed, name, namespace)
    assert status["phase"] == "Succeeded", describe(testbed, name, namespace)
    assert [record["step"] for record in history(testbed, status)] == STEPS
    return status


def rank_process(testbed: Testbed, namespace: str, pod: str) -> int:
    """The process that trains in a pod: a Ray worker that holds an actor of Ray Train."""
    found = [
        entry
        for entry in testbed.cluster.pod_pids(namespace, pod)
        if "ray::" in entry.command_line and "IDLE" not in entry.command_line
    ]
    assert found, testbed.cluster.pod_pids(namespace, pod)
    return found[0].pid


def test_a_killed_rank_is_restarted_in_its_pod(testbed: Testbed, user_namespace: str, tweets: str) -> None:
    testbed.apply(fine_tune_job("rank", user_namespace, tweets))
    wait_for_step(testbed, "rank", user_namespace, 6)
    os.kill(rank_process(testbed, user_namespace, pod_of(testbed, user_namespace, 1)), signal.SIGKILL)
    status = finish(testbed, "rank", user_namespace)
    assert status["restarts"] >= 1


def pod_of(testbed: Testbed, namespace: str, index: int) -> str:
    selector = f"batch.kubernetes.io/job-completion-index={index}"
    return testbed.list("pods", namespace, selector)[0]["metadata"]["name"]


def test_a_deleted_head_pod_is_replaced_and_goes_on(testbed: Testbed, user_namespace: str, tweets: str) -> None:
    testbed.apply(fine_tune_job("head", user_namespace, tweets))
    wait_for_step(testbed, "head", user_namespace, 6)
    testbed.cluster.kubectl(
        "delete", "pod", pod_of(testbed, user_namespace, 0), "-n", user_namespace, "--grace-period=0", "--force"
    )
    status = finish(testbed, "head", user_namespace)
    assert status["restarts"] >= 1


def leader(testbed: Testbed) -> str:
    """The operator's pod that leads."""
    holder = testbed.get("lease", "tunesmith-operator", OPERATOR_NAMESPACE)["spec"]["holderIdentity"]
    return str(holder).rpartition("_")[0]


def test_a_killed_leader_is_followed_within_20_seconds_and_loses_nothing(
    testbed: Testbed, user_namespace: str, tweets: str
) -> None:
    testbed.apply(fine_tune_job("brain", user_namespace, tweets))
    wait_for_step(testbed, "brain", user_namespace, 2)
    before = testbed.get("lease", "tunesmith-operator", OPERATOR_NAMESPACE)["spec"]
    for process in testbed.cluster.pod_pids(OPERATOR_NAMESPACE, leader(testbed)):
        os.kill(process.pid, signal.SIGKILL)

    def followed() -> bool:
        return (
            testbed.get("lease", "tunesmith-operator", OPERATOR_NAMESPACE)["spec"]["acquireTime"]
            != before["acquireTime"]
        )

    testbed.wait_until(followed, "another operator leads", 20)
    finish(testbed, "brain", user_namespace)


def test_deleting_the_namespace_in_mid_training_leaves_nothing(
    testbed: Testbed, user_namespace: str, tweets: str
) -> None:
    testbed.apply(fine_tune_job("gone", user_namespace, tweets))
    wait_for_step(testbed, "gone", user_namespace, 1)
    testbed.cluster.kubectl("delete", "namespace", user_namespace, "--wait=false")
    testbed.wait_until(lambda: not testbed.get("namespace", user_namespace, ""), "the namespace is gone", 120)
