"""API version v1alpha1: the two kinds that users write."""

from tunesmith_api.v1alpha1.common import (
    Condition,
    ConditionStatus,
    ObjectMeta,
    Resources,
    SecretRef,
    Storage,
    Toleration,
)
from tunesmith_api.v1alpha1.deploymentstatus import ModelDeploymentStatus
from tunesmith_api.v1alpha1.finetunejob import FineTuneJob, FineTuneJobSpec
from tunesmith_api.v1alpha1.jobstatus import FineTuneJobStatus
from tunesmith_api.v1alpha1.modeldeployment import ModelDeployment, ModelDeploymentSpec

__all__ = [
    "Condition",
    "ConditionStatus",
    "FineTuneJob",
    "FineTuneJobSpec",
    "FineTuneJobStatus",
    "ModelDeployment",
    "ModelDeploymentSpec",
    "ModelDeploymentStatus",
    "ObjectMeta",
    "Resources",
    "SecretRef",
    "Storage",
    "Toleration",
]
