"""TokenClassification: a class for each word, for example named entities in IOB2 tags.

A word's class is read at its first token, and that is where the loss is; its other tokens don't count. The scores of
entities are CoNLL-2003's (Tjong Kim Sang & De Meulder, 2003): an entity is right if its words and its type are. Tags
that break IOB2 are read as conlleval and seqeval read them: I-X that follows no X begins a new entity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.plan import TrainingPlan
from tunesmith_trainer.models.tokenizers import padding_id, tokenize
from tunesmith_trainer.tasks.base import (
    IGNORE,
    Assessment,
    BadRow,
    Batch,
    DataSummary,
    Example,
    Outcome,
    Prediction,
    Row,
    Task,
)
from tunesmith_trainer.tasks.classes import model_names, position_limit
from tunesmith_trainer.tasks.collator import indices_of, pad_rows, text_inputs
from tunesmith_trainer.tasks.fields import field_of, shorten
from tunesmith_trainer.tasks.objectives import SingleLabel, head_modules, load_with_head
from tunesmith_trainer.tasks.scores import has_spans, unit_scores

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["TokenClassification", "span_counts", "spans_of"]


Span = tuple[str, int, int]
"""Type, first word, word after the last."""


class TokenClassification(Task):
    """Texts that are split into words, and a tag for each word."""

    pipeline_tag = "token-classification"
    has_classes = True
    higher_is_better = SingleLabel.higher_is_better

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__(plan)
        columns = plan.dataset.columns
        self.words, self.tags = columns.tokens, columns.tags
        self.objective = SingleLabel(plan, columns.tags, "tags")
        self._of_model: list[str] = []
        self._longest = plan.training.max_length
        self._spaced = False

    # ---- rows

    def check_row(self, row: Row) -> None:
        words, tags = self._words_of(row), self.labels_of(row)
        if len(words) != len(tags):
            raise BadRow(f"field {self.words!r} has {len(words)} words, but field {self.tags!r} has {len(tags)} tags")

    def _words_of(self, row: Row) -> list[str]:
        words = field_of(row, self.words, "tokens")
        if isinstance(words, str) or not isinstance(words, Sequence) or not words:
            found = "an empty list" if isinstance(words, list) else type(words).__name__
            raise BadRow(f"field {self.words!r} must be a list of words, not {found}; set spec.dataset.columns.tokens")
        for number, word in enumerate(words, 1):
            if not isinstance(word, str):
                raise BadRow(f"field {self.words!r}: word {number} is not a text but {type(word).__name__}")
        return list(words)

    def _tags_of(self, row: Row) -> list[Any]:
        tags = field_of(row, self.tags, "tags")
        if isinstance(tags, str) or not isinstance(tags, Sequence):
            raise BadRow(
                f"field {self.tags!r} must be a list of tags, not {type(tags).__name__}; set spec.dataset.columns.tags"
            )
        return list(tags)

    def labels_of(self, row: Row) -> Sequence[str]:
        return [name for tag in self._tags_of(row) for name in self.objective.names_in(tag)]

    # ---- setting up

    def load_processor(self, folder: Path) -> Any:
        from tunesmith_trainer.models.tokenizers import load_tokenizer

        self._of_model = model_names(folder)
        self._longest = position_limit(folder, self.plan.training.max_length)
        self.processor = load_tokenizer(folder, chat=False)
        # byte-level tokenizers mark a word's start by the space before it, which a list of words doesn't have
        split = self.processor(["a", "a"], is_split_into_words=True)["input_ids"]
        spaced = self.processor(["a", " a"], is_split_into_words=True)["input_ids"]
        self._spaced = split != spaced == self.processor("a a")["input_ids"]
        return self.processor

    def remarks(self, labels: Mapping[str, int]) -> list[str]:
        return self.objective.remarks(labels)

    def prepare(self, summary: DataSummary) -> None:
        self.objective.prepare(summary, self._of_model)

    def encode(self, row: Row) -> list[Example]:
        targets = [self.objective.target(tag) for tag in self._tags_of(row)]
        words = self._words_of(row)
        if self._spaced:
            words = [words[0], *(f" {word}" for word in words[1:])]
        features, encoding, truncated = tokenize(self.processor, words, None, self._longest)
        labels, before = [], None
        for word in encoding.word_ids():
            labels.append(IGNORE if word is None or word == before else targets[word])
            before = word
        units = sum(self.objective.units(label) for label in labels if label != IGNORE)
        return [Example({**features, "labels": labels}, len(labels), units, truncated)] if units else []

    def load_model(self, folder: Path, **options: Any) -> nn.Module:
        from transformers import AutoModelForTokenClassification

        head = self.objective.config_options()
        del head["problem_type"]  # means something to classifiers of whole texts only
        seed = self.plan.training.seed
        return load_with_head(AutoModelForTokenClassification, folder, seed, **head, **options)

    def head_modules(self, model: nn.Module) -> Sequence[str]:
        return head_modules(model)

    # ---- computing

    def collate(self, examples: Sequence[Example], device: torch.device, packed: bool) -> Batch:
        cpu = pad_rows([example.features["labels"] for example in examples], IGNORE)
        owner, column = (cpu != IGNORE).nonzero(as_tuple=True)
        kept = owner * cpu.shape[1] + column
        extras = {"kept": kept.to(device), "owner": owner.to(device), "indices": indices_of(examples)}
        inputs = text_inputs(examples, padding_id(self.processor), device)
        units = sum(example.units for example in examples)
        return Batch(inputs, cpu[owner, column].to(device), units, extras)

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.extras["kept"]].float()
        return Prediction(logits, batch.labels, self.objective.weights_of(batch.labels), batch.extras["owner"])

    def loss_of(self, prediction: Prediction) -> torch.Tensor:
        return self.objective.losses(prediction, self.plan.training.label_smoothing_factor).sum()

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.loss_of(self.predict(model, batch))

    def assess(self, model: nn.Module, batch: Batch) -> Assessment:
        found = self.predict(model, batch)
        assert found.examples is not None
        losses = self.objective.losses(found, 0.0).double().tolist()
        units = float(batch.units)
        names, owners = self.objective.names, found.examples.tolist()
        expected: dict[int, list[str]] = {}
        predicted: dict[int, list[str]] = {}
        lost: dict[int, list[float]] = {}
        guesses = found.logits.argmax(-1).tolist()
        for owner, target, guess, loss in zip(owners, found.targets.tolist(), guesses, losses, strict=True):
            expected.setdefault(owner, []).append(names[target])
            predicted.setdefault(owner, []).append(names[guess])
            lost.setdefault(owner, []).append(loss)
        spans = [span_counts(expected[owner], predicted[owner]) for owner in expected]
        sums = {
            "loss": [sum(losses)],
            "units": [units],
            "spans": [float(sum(count)) for count in zip(*spans, strict=True)],
            **self.objective.sums(found),
        }
        outcomes = [
            Outcome(
                batch.extras["indices"][owner],
                sum(lost[owner]) / len(lost[owner]),
                shorten(" ".join(expected[owner])),
                shorten(" ".join(predicted[owner])),
            )
            for owner in expected
        ]
        return Assessment(sums, outcomes)

    def metrics(self, assessment: Assessment) -> dict[str, float]:
        """Loss and accuracy per word; `precision`, `recall` and `f1`: of whole entities where the tags are IOB2.

        With tags that stand for single words they are macro means over the tags.
        """
        scores = self.objective.metrics(assessment)
        if not has_spans(self.objective.names):
            return scores
        precision, recall, f1 = unit_scores(*assessment.sums["spans"])
        return {**scores, "precision": precision, "recall": recall, "f1": f1}

    def confusion_of(self, assessment: Assessment) -> tuple[list[str], list[list[int]]] | None:
        """Return tags and how often each (row) was taken for each (column); None where that isn't known."""
        return self.objective.confusion_of(assessment)


def spans_of(tags: Sequence[str]) -> set[Span]:
    """Return the spans of one sentence's tags."""
    spans: set[Span] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            spans.add((kind, start, place))
            kind = ""
        if mark != "O" and not kind:
            kind, start = name, place
    return spans


def span_counts(expected: Sequence[str], predicted: Sequence[str]) -> tuple[int, int, int]:
    """Count one sentence's spans: found exactly, predicted, and those that are there."""
    true, said = spans_of(expected), spans_of(predicted)
    return len(true & said), len(said), len(true)
