"""What admission says about the autoscaling of a ModelDeployment: each rule has a mistake that it refuses."""

import pytest

from support import make
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_cli.refusals import refusals
from tunesmith_operator.core.modeldeployment.policies import violation


@pytest.mark.parametrize(
    "autoscaling",
    [
        {"maxReplicas": 1},
        {"minReplicas": 0, "maxReplicas": 1},
        {"minReplicas": 3, "maxReplicas": 3, "targetRequestsInFlight": 67},
    ],
)
def test_bounds_that_leave_room_are_accepted(autoscaling):
    found = make.modeldeployment(autoscaling=autoscaling)
    assert refusals(found, ModelDeployment) == []
    assert violation(ModelDeployment.model_validate(found)) is None


@pytest.mark.parametrize(
    ("autoscaling", "complaint"),
    [
        ({"minReplicas": 3, "maxReplicas": 2}, "autoscaling.minReplicas is larger than autoscaling.maxReplicas"),
        ({"minReplicas": 0}, "autoscaling.maxReplicas"),
        ({"maxReplicas": 0}, "autoscaling.maxReplicas"),
        ({"maxReplicas": 2, "idleSeconds": 0}, "autoscaling.idleSeconds"),
        ({"maxReplicas": 2, "targetRequests": 4}, "targetRequests"),
    ],
)
def test_others_are_refused_in_words(autoscaling, complaint):
    found = refusals(make.modeldeployment(autoscaling=autoscaling), ModelDeployment)
    assert [message for message in found if complaint in message], found


def test_a_target_that_is_never_exceeded_is_refused_in_words():
    found = make.modeldeployment(
        autoscaling={"maxReplicas": 2, "targetRequestsInFlight": 10},
        engine={"parallelRequests": 2},
        api={"maxWaitingRequests": 8},
    )
    broken = violation(ModelDeployment.model_validate(found))
    assert broken is not None
    assert "(10) is never exceeded: a server takes in 10 requests" in broken.message
