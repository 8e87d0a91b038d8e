"""The rows that a revision's importance matrix is computed from: those that the spec names, else the training data.

`source` and `template` ask for them, `decide` whether they can be had. Only API types are known here.
"""

from __future__ import annotations

from typing import Final, Protocol

from tunesmith_api.plan import CalibrationPlan
from tunesmith_api.v1alpha1 import FineTuneJob, ModelDeployment
from tunesmith_api.v1alpha1.dataset import DataFormat
from tunesmith_api.v1alpha1.quantization import CALIBRATED_METHODS, QuantizationMethod
from tunesmith_api.v1alpha1.task import Task
from tunesmith_operator.core.reconcile.rules import Violation

__all__ = ["Trained", "calibration_plan", "cannot_be_calibrated", "training_rows_of"]

_READ: Final = (Task.CHAT_SFT, Task.CAUSAL_LM)
"""Tasks whose rows are texts as the model will read them."""
_OTHER_FORMATS: Final = (".csv", ".tsv", ".parquet", ".txt")


class Trained(Protocol):
    """What is asked of a source."""

    @property
    def training(self) -> CalibrationPlan | None:
        """The rows that its FineTuneJob learns from."""


def training_rows_of(job: FineTuneJob) -> CalibrationPlan | None:
    """The rows that the job learns from, where the quantize Job can read them."""
    rows, columns = job.spec.dataset.train, job.spec.dataset.columns
    if job.spec.task not in _READ or rows.format not in (DataFormat.AUTO, DataFormat.JSONL):
        return None
    fields = {"messages_field": columns.messages, "text_field": columns.text}
    if rows.inline is not None:
        return CalibrationPlan(inline=rows.inline, **fields)
    if rows.uri is None or not rows.uri.startswith("s3://") or rows.uri.lower().endswith(_OTHER_FORMATS):
        return None
    return CalibrationPlan(uri=rows.uri, **fields)


def calibration_plan(
    deployment: ModelDeployment, method: QuantizationMethod, training: CalibrationPlan | None
) -> CalibrationPlan | None:
    """What the quantize Job calibrates with; None where it isn't asked for, or makes no difference to the method."""
    asked = deployment.spec.quantization.calibration
    if asked is None or method not in CALIBRATED_METHODS:
        return None
    rows = CalibrationPlan(uri=asked.dataset) if asked.dataset is not None else training or CalibrationPlan()
    return rows.model_copy(update={"max_examples": asked.max_examples, "seed": asked.seed})


def cannot_be_calibrated(deployment: ModelDeployment, source: Trained) -> Violation | None:
    """The rows that are asked for can't be read."""
    asked = deployment.spec.quantization.calibration
    if asked is None:
        return None
    if asked.dataset is not None:
        if not asked.dataset.lower().endswith(_OTHER_FORMATS):
            return None
        return Violation(
            f"spec.quantization.calibration.dataset {asked.dataset} is no JSON Lines: convert it to rows of messages "
            "or text in a .jsonl file"
        )
    if source.training is not None:
        return None
    return Violation(
        "spec.quantization.calibration takes texts, and the FineTuneJob has no dataset.train of chat rows or texts as "
        "JSON Lines in s3:// or inline: name some in spec.quantization.calibration.dataset"
    )
