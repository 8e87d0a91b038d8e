"""Whether a deployment answers: a row for each rule, with the reason why there is one."""

from dataclasses import replace

import pytest

from support import make
from tunesmith_api.keys import LABEL_COMPONENT, LABEL_REVISION, Reason
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_api.v1alpha1.api import Api
from tunesmith_api.v1alpha1.autoscaling import AutoscalingStatus
from tunesmith_api.v1alpha1.deploymentstatus import Revision
from tunesmith_operator.core.modeldeployment.activator import Activation
from tunesmith_operator.core.modeldeployment.observed import Children
from tunesmith_operator.core.modeldeployment.revisions import History
from tunesmith_operator.core.modeldeployment.scaling import Scaling
from tunesmith_operator.core.modeldeployment.summary import RULES, Situation, ready
from tunesmith_operator.core.pods.startup import StartupProblem
from tunesmith_operator.core.pods.view import ContainerView, PodView


def revision(number, phase, **fields):
    return Revision(
        number=number, name=f"sentiment-r{number}", hash="h", phase=phase, model_uri="s3://models/sentiment",
        quantization="Q8_0", artifact_uri="s3://a", **fields,
    )  # fmt: skip


def crashed(number):
    container = ContainerView(
        "server", waiting="CrashLoopBackOff", exit_code=1, ended_message="out of luck", restarts=3
    )
    labels = {LABEL_REVISION: f"r{number}", LABEL_COMPONENT: "server"}
    return PodView(namespace="ml", name="p", labels=labels, phase="Running", container=container)


def scaling(desired=None, **fields):
    """As autoscaling has it; without a number, there is none."""
    deployment = ModelDeployment.model_validate(make.modeldeployment())
    status = AutoscalingStatus(desired_replicas=desired, message="17 requests.") if desired is not None else None
    return Scaling(deployment=deployment, activation=Activation(None, Api(), 4), status=status, **fields)


def situation(latest, current=None, answering=0, desired=1, problem=None, pods=(), scaled=None):
    revisions = tuple(it for it in (current, latest) if it is not None)
    children = Children(
        service=None, network_policy=None, disruption_budget=None, config_maps={}, jobs={}, deployments={}, pods=tuple(pods), rejections=(),
        orphans=(),
    )  # fmt: skip
    return Situation(
        History(revisions, current, latest), latest, answering, desired, problem, children, scaled or scaling()
    )


ACTIVE = revision(1, "Active")
FAILED = {"phase": "Failed", "reason": "StorageUnwritable", "message": "no right to put objects"}
PROBLEM = StartupProblem(Reason.IMAGE_PULL_FAILED, "no such image", None)
TABLE = [
    ("first_revision_failed", "nothing will answer without a change", situation(revision(1, **FAILED), problem=PROBLEM), "False", "StorageUnwritable"),
    ("first_revision_cannot_start", "a pod that can't start says more than the step that waits for it", situation(revision(1, "Quantizing"), problem=PROBLEM), "False", "ImagePullFailed"),
    ("first_revision_quantizing", "there is nothing to serve yet", situation(revision(1, "Quantizing")), "False", "Quantizing"),
    ("first_revision_crashed", "a server that ends again and again isn't loading", situation(revision(1, "RollingOut"), pods=[crashed(1)]), "False", "ServerFailed"),
    ("first_revision_starting", "a model takes its time to load", situation(revision(1, "RollingOut")), "False", "RollingOut"),
    ("scaled_to_zero", "that nobody answers is what was asked for", situation(ACTIVE, ACTIVE, desired=0), "True", "ScaledToZero"),
    ("all_replicas_answer", "what is asked for answers", situation(ACTIVE, ACTIVE, answering=1), "True", "ReplicasAvailable"),
    ("all_replicas_answer", "a newer revision that failed takes nothing away", situation(revision(2, **FAILED), ACTIVE, answering=1), "True", "ReplicasAvailable"),
    ("scaled_to_zero", "a request wakes it", situation(ACTIVE, ACTIVE, desired=0, scaled=scaling(0, asleep=True)), "True", "ScaledToZero"),
    ("waking", "requests wait for a server, and none is refused", situation(ACTIVE, ACTIVE, scaled=scaling(1, asleep=True)), "Unknown", "Waking"),
    ("scaling_up", "what was there answers, and more is on its way", situation(ACTIVE, ACTIVE, answering=1, desired=2, scaled=scaling(2, raised=True)), "True", "ScalingUp"),
    ("some_replicas_missing", "a server that can't start wakes nobody", situation(ACTIVE, ACTIVE, pods=[crashed(1)], scaled=scaling(1, asleep=True)), "False", "ReplicasUnavailable"),
    ("some_replicas_missing", "what was added long ago is missing", situation(ACTIVE, ACTIVE, answering=1, desired=2, scaled=scaling(2)), "Unknown", "ReplicasUnavailable"),
    ("some_replicas_missing", "some requests are answered", situation(ACTIVE, ACTIVE, answering=1, desired=2), "Unknown", "ReplicasUnavailable"),
    ("some_replicas_missing", "none is", situation(ACTIVE, ACTIVE, pods=[crashed(1)]), "False", "ReplicasUnavailable"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "why", "seen", "status", "reason"), TABLE, ids=[row[1] for row in TABLE])
def test_the_first_rule_that_applies_is_what_people_see(rule, why, seen, status, reason):
    assert next(it.__name__ for it in RULES if it(seen) is not None) == rule
    found = ready(seen)
    assert (found.type, found.status, found.reason) == ("Ready", status, reason)


def test_causes_are_added_where_they_are_known():
    assert "out of luck" in ready(situation(ACTIVE, ACTIVE, pods=[crashed(1)])).message
    assert ready(situation(revision(2, **FAILED), ACTIVE, answering=1)).message.endswith(
        "sentiment-r2 failed: no right to put objects"
    )


def test_a_server_without_its_api_keys_is_reported_as_other_missing_secrets_are():
    report = make.failed(Reason.SECRET_NOT_FOUND, message="Secret clients is not there or has no keys")
    ended = replace(crashed(1).container, exit_code=40, ended_message=report.to_bounded_json())
    lacking = replace(crashed(1), container=ended)
    found = ready(situation(revision(1, "RollingOut"), pods=[lacking]))
    assert found.reason == Reason.SECRET_NOT_FOUND
    assert "Secret clients" in found.message


def test_every_rule_has_a_row():
    assert {row[0] for row in TABLE} == {rule.__name__ for rule in RULES}
