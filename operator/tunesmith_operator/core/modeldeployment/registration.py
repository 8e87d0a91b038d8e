"""ModelDeployment as the registry of kinds knows it."""

from __future__ import annotations

from typing import Final

from tunesmith_api import keys
from tunesmith_api.keys import DeploymentCondition
from tunesmith_api.v1alpha1 import ModelDeployment, ModelDeploymentStatus
from tunesmith_operator.core.kubernetes.resources import MODELDEPLOYMENT
from tunesmith_operator.core.modeldeployment.decide import decide
from tunesmith_operator.core.modeldeployment.observed import Observed, observe, references
from tunesmith_operator.core.modeldeployment.status import unreadable_status
from tunesmith_operator.core.reconcile.kind import Kind

__all__ = ["MODEL_DEPLOYMENT"]

MODEL_DEPLOYMENT: Final[Kind[ModelDeployment, Observed]] = Kind(
    resource=MODELDEPLOYMENT,
    label=keys.LABEL_MODELDEPLOYMENT,
    model=ModelDeployment,
    status=ModelDeploymentStatus,
    summary=DeploymentCondition.READY.value,
    observe=observe,
    decide=decide,
    unreadable=unreadable_status,
    references=references,
)
