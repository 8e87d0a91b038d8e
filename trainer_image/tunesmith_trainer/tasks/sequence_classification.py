"""SequenceClassification: a text (or a pair of texts) → one class, several classes, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.plan import TrainingPlan
from tunesmith_trainer.models.tokenizers import padding_id, tokenize
from tunesmith_trainer.tasks.base import Batch, Example, Row
from tunesmith_trainer.tasks.classes import model_names, position_limit
from tunesmith_trainer.tasks.classifier import Classifier
from tunesmith_trainer.tasks.collator import indices_of, stack, text_inputs
from tunesmith_trainer.tasks.fields import field_of, text_field
from tunesmith_trainer.tasks.objectives import load_with_head, objective_for

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["SequenceClassification"]


class SequenceClassification(Classifier):
    """Whole texts; what the outputs mean is the objective's part."""

    pipeline_tag = "text-classification"

    def __init__(self, plan: TrainingPlan) -> None:
        columns = plan.dataset.columns
        super().__init__(plan, objective_for(plan, columns.label))
        self.text, self.pair = columns.text, columns.text_pair
        self._longest = plan.training.max_length

    # ---- rows

    def check_row(self, row: Row) -> None:
        self.texts_of(row)
        self.labels_of(row)

    def texts_of(self, row: Row) -> Mapping[str, str]:
        texts = {self.text: text_field(row, self.text, "text")}
        if self.pair is not None:
            texts[self.pair] = text_field(row, self.pair, "textPair")
        return texts

    # ---- setting up

    def load_processor(self, folder: Path) -> Any:
        from tunesmith_trainer.models.tokenizers import load_tokenizer

        self._model_names = model_names(folder)
        self._longest = position_limit(folder, self.plan.training.max_length)
        self.processor = load_tokenizer(folder, chat=False)
        return self.processor

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

    # ---- computing

    def collate(self, examples: Sequence[Example], device: torch.device, packed: bool) -> Batch:
        inputs = text_inputs(examples, padding_id(self.processor), device)
        labels = stack(examples, "labels", device)
        if not labels.is_floating_point():  # one class each
            labels = labels[:, 0]
        units = sum(example.units for example in examples)
        return Batch(inputs, labels, units, {"indices": indices_of(examples)})
