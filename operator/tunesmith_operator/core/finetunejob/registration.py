"""FineTuneJob as the registry of kinds knows it."""

from __future__ import annotations

from typing import Final

from tunesmith_api import keys
from tunesmith_api.keys import JobCondition
from tunesmith_api.v1alpha1 import FineTuneJob, FineTuneJobStatus
from tunesmith_operator.core.finetunejob.decide import decide
from tunesmith_operator.core.finetunejob.observed import Observed, observe
from tunesmith_operator.core.finetunejob.status import unreadable_status
from tunesmith_operator.core.kubernetes.resources import FINETUNEJOB
from tunesmith_operator.core.reconcile.kind import Kind

__all__ = ["FINE_TUNE_JOB"]

FINE_TUNE_JOB: Final[Kind[FineTuneJob, Observed]] = Kind(
    resource=FINETUNEJOB,
    label=keys.LABEL_FINETUNEJOB,
    model=FineTuneJob,
    status=FineTuneJobStatus,
    summary=JobCondition.SUCCEEDED.value,
    observe=observe,
    decide=decide,
    unreadable=unreadable_status,
)
