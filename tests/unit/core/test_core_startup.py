"""Why pods don't start: from their status to a reason, a remedy and a bound."""

from datetime import timedelta

import pytest

from support import make
from tunesmith_operator.core.kubernetes.objects import RejectionView
from tunesmith_operator.core.pods.startup import STORAGE_SECRET, Patience, SecretUse, examine
from tunesmith_operator.core.pods.view import PodView

PATIENCE = Patience(timedelta(seconds=60))


def pod(state=None, *, scheduled=0.0, why="", name="sentiment-1-0-abc", **status):
    conditions = []
    if scheduled is not None:
        conditions.append({"type": "PodScheduled", "status": "True", "lastTransitionTime": make.stamp(scheduled)})
    elif why:
        conditions.append({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why})
    containers = [{"name": "trainer", "image": "registry/trainer:1", "state": state}] if state else []
    meta = {
        "name": name, "namespace": "ml", "labels": {"tunesmith.dev/finetunejob": "sentiment"},
        "creationTimestamp": make.stamp(0),
    }  # fmt: skip
    base = {"phase": "Pending", "conditions": conditions, "containerStatuses": containers}
    return PodView.of({"metadata": meta, "status": {**base, **status}})


def waiting(reason, message=""):
    return {"waiting": {"reason": reason, "message": message}}


CASES = {
    "a registry that doesn't have the image": (
        pod(waiting("ErrImagePull", "failed to pull: not found")),
        "ImagePullFailed", ["registry/trainer:1", "not found", "Correct the image name"], True,
    ),
    "an image name that is none": (
        pod(waiting("InvalidImageName", "couldn't parse image name")),
        "ImagePullFailed", ["couldn't parse"], True,
    ),
    "a Secret that doesn't exist": (
        pod(waiting("CreateContainerConfigError", 'secret "s3" not found')),
        "SecretNotFound",
        ["Create Secret s3 in namespace ml", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "storage.secretRef"], True,
    ),
    "a Secret that lacks a key": (
        pod(waiting("CreateContainerConfigError", "couldn't find key AWS_ACCESS_KEY_ID in Secret ml/s3")),
        "SecretNotFound", ["Secret s3", "AWS_ACCESS_KEY_ID"], True,
    ),
    "a Secret for the Hub that doesn't exist": (
        pod(waiting("CreateContainerConfigError", 'secret "hub" not found')),
        "SecretNotFound", ["Create Secret hub in namespace ml with the key HF_TOKEN (spec.huggingFace.secretRef names it)"], True,
    ),
    "one Secret for two things": (
        pod(waiting("CreateContainerConfigError", 'secret "both" not found')),
        "SecretNotFound", ["AWS_SECRET_ACCESS_KEY and HF_TOKEN", "spec.storage.secretRef and spec.huggingFace.secretRef name it"], True,
    ),
    "one Secret for two things that lacks a key": (
        pod(waiting("CreateContainerConfigError", "couldn't find key HF_TOKEN in Secret ml/both")),
        "SecretNotFound", ["with the key HF_TOKEN (spec.huggingFace.secretRef names it)"], True,
    ),
    "a claim that doesn't exist": (
        pod(scheduled=None, why='0/2 nodes are available: persistentvolumeclaim "models" not found.'),
        "Unschedulable", ["PersistentVolumeClaim models", "none in namespace ml", "pvc://models URIs"], False,
    ),
    "the operator's own Secret that somebody deleted": (
        pod(waiting("CreateContainerConfigError", 'secret "sentiment-1-ray-abcde" not found')),
        "SecretNotFound", ["the operator makes it again"], True,
    ),
    "a ConfigMap that doesn't exist": (
        pod(waiting("CreateContainerConfigError", 'configmap "x" not found')),
        "ContainerConfigError", ['configmap "x" not found'], True,
    ),
    "a command that the image doesn't have": (
        pod(waiting("RunContainerError", 'exec: "python3": executable file not found')),
        "ContainerConfigError", ["executable file not found"], True,
    ),
    "no room in the cluster": (
        pod(scheduled=None, why="0/2 nodes are available: 2 Insufficient nvidia.com/gpu."),
        "Unschedulable", ["2 Insufficient nvidia.com/gpu. It waits for room"], False,
    ),
}  # fmt: skip
SECRETS = (
    SecretUse(STORAGE_SECRET.field, STORAGE_SECRET.keys, "s3"),
    SecretUse(STORAGE_SECRET.field, STORAGE_SECRET.keys, "both"),
    SecretUse("huggingFace.secretRef", ("HF_TOKEN",), "hub"),
    SecretUse("huggingFace.secretRef", ("HF_TOKEN",), "both"),
)


@pytest.mark.parametrize("case", CASES)
def test_a_pod_that_cannot_start_has_a_reason_a_remedy_and_a_bound(case):
    view, reason, words, bounded = CASES[case]
    found = examine([view], (), PATIENCE, make.at(10), SECRETS)
    assert found.problem.reason == reason
    for word in words:
        assert word in found.problem.message
    assert found.expired is None
    assert found.deadline == (make.at(60) if bounded else None)
    late = examine([view], (), PATIENCE, make.at(61))
    assert (late.expired is not None) == bounded


def test_the_kubelets_two_wordings_of_a_failed_pull_give_one_message():
    first = pod(waiting("ErrImagePull", "rpc error: not found"))
    second = pod(
        waiting("ImagePullBackOff", 'Back-off pulling image "registry/trainer:1": ErrImagePull: rpc error: not found')
    )
    messages = {examine([view], (), PATIENCE, make.at(1)).problem.message for view in (first, second)}
    assert len(messages) == 1


def test_a_pod_that_is_quietly_preparing_is_no_problem_until_its_time_is_up():
    view = pod(waiting("ContainerCreating"))
    early = examine([view], (), PATIENCE, make.at(59))
    assert (early.problem, early.expired, early.deadline) == (None, None, make.at(60))
    late = examine([view], (), PATIENCE, make.at(60))
    assert late.expired.reason == "StartupTimeout"
    assert "kubectl describe pod -n ml sentiment-1-0-abc" in late.expired.message


def test_a_running_pod_and_a_pod_that_is_being_deleted_are_no_problem():
    running = pod({"running": {}}, phase="Running")
    assert examine([running], (), PATIENCE, make.at(1000)).problem is None


def test_waiting_for_room_does_not_hide_that_another_pod_has_waited_too_long():
    views = [pod(scheduled=None, why="no room"), pod(waiting("ContainerCreating"), name="b")]
    found = examine(views, (), PATIENCE, make.at(61))
    assert found.problem.reason == "Unschedulable"
    assert found.expired.reason == "StartupTimeout"


def rejection(message, first=0.0, last=5.0):
    return RejectionView("job", message, make.at(first), make.at(last))


def test_refused_pods_are_told_without_their_random_names_and_bounded_from_the_first_refusal():
    message = 'Error creating: pods "sentiment-1-0-xyz" is forbidden: violates PodSecurity "restricted:latest"'
    found = examine([], [rejection(message)], PATIENCE, make.at(10))
    assert found.problem.reason == "PodRejected"
    assert 'pods is forbidden: violates PodSecurity "restricted:latest"' in found.problem.message
    assert "xyz" not in found.problem.message
    assert found.deadline == make.at(60)
    assert examine([], [rejection(message)], PATIENCE, make.at(60)).expired is not None


def test_a_full_quota_is_waited_for_without_limit():
    found = examine([], [rejection("exceeded quota: gpus")], PATIENCE, make.at(10_000))
    assert found.problem.reason == "PodRejected"
    assert found.expired is None


ROOM = Patience(timedelta(seconds=60), room=timedelta(seconds=300))


@pytest.mark.parametrize(
    ("pods", "rejections", "reason"),
    [
        ([pod(scheduled=None, why="0/2 nodes are available")], [], "Unschedulable"),
        ([pod(scheduled=None)], [], "Unschedulable"),
        ([], [rejection("exceeded quota: gpus")], "PodRejected"),
    ],
)
def test_room_is_waited_for_as_long_as_the_job_says(pods, rejections, reason):
    early = examine(pods, rejections, ROOM, make.at(299))
    assert (early.problem.reason, early.expired, early.deadline) == (reason, None, make.at(300))
    assert examine(pods, rejections, ROOM, make.at(300)).expired.reason == reason


def test_a_pod_that_no_scheduler_speaks_of_is_told_after_a_while_and_waits():
    view = pod(scheduled=None)
    early = examine([view], (), PATIENCE, make.at(29))
    assert (early.problem, early.deadline) == (None, make.at(30))
    late = examine([view], (), PATIENCE, make.at(10_000))
    assert "no scheduler says why: its gang isn't complete (PodGroup)" in late.problem.message
    assert (late.expired, late.deadline) == (None, None)


def test_a_refusal_before_the_newest_pod_is_past():
    assert examine([pod({"running": {}})], [rejection("no", 0, -5)], PATIENCE, make.at(10)).problem is None
