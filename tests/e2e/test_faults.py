"""What dies during training: a rank, a pod, the namespace. No step is lost, and none is counted twice.

The operator's leader dies in `test_whole_path`.
"""

import os
import signal

import pytest

from testbed import Testbed
from testbed.jobs import describe, fine_tune_job, history, wait_finished, wait_for_step

STEPS = 20
pytestmark = pytest.mark.timeout(1200)


def rank_process(testbed: Testbed, namespace: str, pod: str) -> int:
    """The process that trains in a pod: a Ray worker that holds an actor of Ray Train."""
    found = [
        entry
        for entry in testbed.cluster.pod_pids(namespace, pod)
        if "ray::" in entry.command_line and "IDLE" not in entry.command_line
    ]
    assert found, testbed.cluster.pod_pids(namespace, pod)
    return found[0].pid


def pod_of(testbed: Testbed, namespace: str, index: int) -> str:
    selector = f"batch.kubernetes.io/job-completion-index={index}"
    return testbed.list("pods", namespace, selector)[0]["metadata"]["name"]


def test_a_killed_rank_is_restarted_in_its_pod_and_a_deleted_head_pod_is_replaced(
    testbed: Testbed, user_namespace: str, tweets: str
) -> None:
    job = fine_tune_job("faulty", user_namespace, tweets)
    job["spec"]["training"]["maxSteps"] = STEPS
    testbed.apply(job)
    wait_for_step(testbed, "faulty", user_namespace, 6)
    other = pod_of(testbed, user_namespace, 1)
    os.kill(rank_process(testbed, user_namespace, other), signal.SIGKILL)
    wait_for_step(testbed, "faulty", user_namespace, 11)
    assert testbed.get("ftj", "faulty", user_namespace)["status"]["restarts"] >= 1
    assert pod_of(testbed, user_namespace, 1) == other
    head = pod_of(testbed, user_namespace, 0)
    testbed.cluster.kubectl("delete", "pod", head, "-n", user_namespace, "--grace-period=0", "--force")
    status = wait_finished(testbed, "faulty", user_namespace)
    assert status["phase"] == "Succeeded", describe(testbed, "faulty", user_namespace)
    assert [record["step"] for record in history(testbed, status)] == list(range(1, STEPS + 1))
    assert status["restarts"] >= 2


def test_deleting_the_namespace_in_mid_training_leaves_nothing(
    testbed: Testbed, user_namespace: str, tweets: str
) -> None:
    alone = {"replicas": 1, "resources": {"cpu": "900m", "memory": "3Gi"}}
    testbed.apply(fine_tune_job("gone", user_namespace, tweets, workers=alone))
    wait_for_step(testbed, "gone", user_namespace, 1)
    testbed.cluster.kubectl("delete", "namespace", user_namespace, "--wait=false")
    testbed.wait_until(lambda: not testbed.get("namespace", user_namespace, ""), "the namespace is gone", 120)
