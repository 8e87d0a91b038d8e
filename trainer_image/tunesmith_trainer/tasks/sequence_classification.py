"""SequenceClassification: a text (or a pair of texts) → one class, several classes, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.plan import TrainingPlan
from tunesmith_trainer.models.tokenizers import padding_id, tokenize
from tunesmith_trainer.tasks.base import Assessment, Batch, DataSummary, Example, Prediction, Row, Task
from tunesmith_trainer.tasks.causal_lm import text_field
from tunesmith_trainer.tasks.classes import field_of, model_names, position_limit
from tunesmith_trainer.tasks.collator import indices_of, stack, text_inputs
from tunesmith_trainer.tasks.objectives import head_modules, load_with_head, objective_for

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["SequenceClassification"]


class SequenceClassification(Task):
    """Whole texts; what the outputs mean is the objective's part."""

    pipeline_tag = "text-classification"

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__(plan)
        columns = plan.dataset.columns
        self.text, self.pair, self.label = columns.text, columns.text_pair, columns.label
        self.objective = objective_for(plan, columns.label)
        self.higher_is_better = self.objective.higher_is_better
        self._of_model: list[str] = []
        self._longest = plan.training.max_length

    # ---- rows

    def check_row(self, row: Row) -> None:
        self.texts_of(row)
        self.labels_of(row)

    def labels_of(self, row: Row) -> Sequence[str]:
        return self.objective.names_in(field_of(row, self.label, "label"))

    def texts_of(self, row: Row) -> Mapping[str, str]:
        texts = {self.text: text_field(row, self.text, "text")}
        if self.pair is not None:
            texts[self.pair] = text_field(row, self.pair, "textPair")
        return texts

    # ---- setting up

    def load_processor(self, folder: Path) -> Any:
        from tunesmith_trainer.models.tokenizers import load_tokenizer

        self._of_model = model_names(folder)
        self._longest = position_limit(folder, self.plan.training.max_length)
        self.processor = load_tokenizer(folder, chat=False)
        return self.processor

    def prepare(self, summary: DataSummary) -> None:
        self.objective.prepare(summary, self._of_model)

    def encode(self, row: Row) -> list[Example]:
        target = self.objective.target(field_of(row, self.label, "label"))
        texts = self.texts_of(row)
        pair = None if self.pair is None else texts[self.pair]
        features, _, truncated = tokenize(self.processor, texts[self.text], pair, self._longest)
        features["labels"] = target if isinstance(target, list) else [target]
        return [Example(features, len(features["input_ids"]), self.objective.units(target), truncated)]

    def load_model(self, folder: Path, **options: Any) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        head = self.objective.config_options()
        model = load_with_head(AutoModelForSequenceClassification, folder, self.plan.training.seed, **head, **options)
        # causal models read the class at the last token that is no padding
        model.config.pad_token_id = padding_id(self.processor)
        return model

    def head_modules(self, model: nn.Module) -> Sequence[str]:
        return head_modules(model)

    # ---- computing

    def collate(self, examples: Sequence[Example], device: torch.device, packed: bool) -> Batch:
        inputs = text_inputs(examples, padding_id(self.processor), device)
        labels = stack(examples, "labels", device)
        if not labels.is_floating_point():  # one class each
            labels = labels[:, 0]
        units = sum(example.units for example in examples)
        return Batch(inputs, labels, units, {"indices": indices_of(examples)})

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
