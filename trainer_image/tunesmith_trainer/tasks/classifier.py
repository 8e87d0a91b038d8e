"""What classifiers have in common, whatever they read: an objective says what their outputs mean.

The base of `sequence_classification` and `image_classification`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tunesmith_api.plan import TrainingPlan
from tunesmith_trainer.tasks.base import Assessment, Batch, DataSummary, Prediction, Row, Task
from tunesmith_trainer.tasks.fields import field_of
from tunesmith_trainer.tasks.objectives import Objective, head_modules

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Classifier"]


class Classifier(Task):
    """One answer per example, from a new head on the model."""

    def __init__(self, plan: TrainingPlan, objective: Objective) -> None:
        super().__init__(plan)
        self.label = plan.dataset.columns.label
        self.objective = objective
        self.higher_is_better = objective.higher_is_better
        self.has_classes = objective.has_classes
        self._model_names: list[str] = []
        """The classes that the model's config.json names."""

    def labels_of(self, row: Row) -> Sequence[str]:
        return self.objective.names_in(field_of(row, self.label, "label"))

    def vector_width(self, row: Row) -> int | None:
        return self.objective.vector_width(field_of(row, self.label, "label"))

    def expect_vectors(self, width: int) -> None:
        self.objective.width = width

    def remarks(self, labels: Mapping[str, int]) -> list[str]:
        return self.objective.remarks(labels)

    def prepare(self, summary: DataSummary) -> None:
        self.objective.prepare(summary, self._model_names)

    def head_modules(self, model: nn.Module) -> Sequence[str]:
        return head_modules(model)

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        logits = model(**batch.inputs).logits.float()
        return Prediction(logits, batch.labels, self.objective.weights_of(batch.labels))

    def loss_of(self, prediction: Prediction) -> torch.Tensor:
        return self.objective.losses(prediction, self.plan.training.label_smoothing_factor).sum()

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.loss_of(self.predict(model, batch))

    def assess(self, model: nn.Module, batch: Batch) -> Assessment:
        return self.objective.assess(self.predict(model, batch), batch.extras["indices"])

    def metrics(self, assessment: Assessment) -> dict[str, float]:
        """Loss per example (weighted, where classes are), and the objective's scores."""
        return self.objective.metrics(assessment)

    def confusion_of(self, assessment: Assessment) -> tuple[list[str], list[list[int]]] | None:
        """Return class names and how often each (row) was taken for each (column); None where that isn't known."""
        return self.objective.confusion_of(assessment)
