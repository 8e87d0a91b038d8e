"""Reward: a model that gives an answer one number, learned from pairs of a better and a worse one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.plan import TrainingPlan
from tunesmith_trainer.models.tokenizers import padding_id
from tunesmith_trainer.tasks.base import Assessment, Batch, Example, Prediction, Row, Task
from tunesmith_trainer.tasks.classes import position_limit
from tunesmith_trainer.tasks.collator import indices_of, length_mask, pad_rows
from tunesmith_trainer.tasks.objectives import head_modules, load_with_head
from tunesmith_trainer.tasks.preference import assessment_of, changeable_prompts, per_pair, won
from tunesmith_trainer.tasks.preference_pairs import SIDES, PairEncoder, read_pair

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Reward"]


class Reward(Task):
    """A model that gives an answer one number; the better of two should have the higher (Bradley & Terry, 1952).

    The loss of a pair is -log sigmoid(better - worse). That is the cross entropy of the two numbers, the better one
    being right: so label smoothing and distillation are those of a classifier with two classes.
    """

    higher_is_better = frozenset({"accuracy", "margin"})
    pipeline_tag = "text-classification"

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__(plan)
        self._longest = plan.training.max_length

    # ---- rows

    def check_row(self, row: Row) -> None:
        read_pair(row, self.plan.dataset.columns)

    def texts_of(self, row: Row) -> Mapping[str, str]:
        """The prompt, where it is a text of its own."""
        return changeable_prompts(row, self.plan.dataset.columns)

    # ---- setting up

    def load_processor(self, folder: Path) -> Any:
        from tunesmith_trainer.models.tokenizers import load_tokenizer

        self._longest = position_limit(folder, self.plan.training.max_length)
        tokenizer = load_tokenizer(folder, chat=False)
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            # a classifier reads its score at the last token that isn't padding: who uses it later has to know that one
            tokenizer.pad_token = tokenizer.eos_token
        self.processor = tokenizer
        return tokenizer

    def encode(self, row: Row) -> list[Example]:
        pair = read_pair(row, self.plan.dataset.columns)
        chosen, rejected = PairEncoder(self.processor, self._longest).sides(pair)
        if chosen.input_ids == rejected.input_ids:
            return []  # the cut has left no difference
        features = {"chosen_input_ids": chosen.input_ids, "rejected_input_ids": rejected.input_ids}
        length = len(chosen.input_ids) + len(rejected.input_ids)
        return [Example(features, length, 1.0, chosen.truncated or rejected.truncated)]

    def load_model(self, folder: Path, **options: Any) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        seed = self.plan.training.seed
        model = load_with_head(AutoModelForSequenceClassification, folder, seed, num_labels=1, **options)
        # causal models read their score at the last token that is no padding
        model.config.pad_token_id = padding_id(self.processor)
        return model

    def head_modules(self, model: nn.Module) -> Sequence[str]:
        return head_modules(model)

    # ---- computing

    def collate(self, examples: Sequence[Example], device: torch.device, packed: bool) -> Batch:
        import torch

        rows = [example.features[f"{side}_input_ids"] for side in SIDES for example in examples]
        inputs = {
            "input_ids": pad_rows(rows, padding_id(self.processor), device),
            "attention_mask": length_mask([len(row) for row in rows], device),
        }
        # of each pair's two numbers the first is the better one's
        labels = torch.zeros(len(examples), dtype=torch.long, device=device)
        extras = {"indices": indices_of(examples), "examples": examples}
        return Batch(inputs, labels, float(len(examples)), extras)

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Score both answers of each pair: logits are [pairs, 2], the better one first."""
        scores = model(**batch.inputs).logits.float().reshape(2, -1)
        return Prediction(scores.T, batch.labels)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.loss_of(self.predict(model, batch))

    def assess(self, model: nn.Module, batch: Batch) -> Assessment:
        from torch.nn import functional

        scores = self.predict(model, batch).logits.double()
        better, worse = scores[:, 0], scores[:, 1]
        margins = better - worse
        losses = -functional.logsigmoid(margins)
        return assessment_of(self.processor, batch, losses, won(better, worse), margin=margins)

    def metrics(self, assessment: Assessment) -> dict[str, float]:
        """Loss per pair, how often the better answer scores higher, and by how much on average."""
        return {
            "loss": per_pair(assessment, "loss"),
            "accuracy": per_pair(assessment, "right"),
            "margin": per_pair(assessment, "margin"),
        }
