"""What a classifier's outputs mean: one class each, several classes each, or a number.

Called by the tasks with classes. An objective knows targets, their loss and their scores; it knows nothing of what the
model reads (texts, words, images), which is the task's part. All losses are sums over units; see `tasks.base`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.task import ClassWeights, ProblemType
from tunesmith_store.errors import UserError
from tunesmith_trainer.tasks.base import Assessment, BadRow, DataSummary, Outcome, Prediction
from tunesmith_trainer.tasks.classes import (
    balanced_weights,
    choose_names,
    config_options,
    merged,
    name_of,
    number_of,
    remarks_on,
)
from tunesmith_trainer.tasks.scores import (
    class_scores,
    class_sums,
    confusion_matrix,
    matthews,
    multi_label_sums,
    regression_scores,
    regression_sums,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["MultiLabel", "Objective", "Regression", "SingleLabel", "head_modules", "load_with_head", "objective_for"]

Target = int | list[float]


class Objective(ABC):
    """Targets, loss and scores of one problem type."""

    higher_is_better: frozenset[str]

    def __init__(self, plan: TrainingPlan, column: str, setting: str = "label") -> None:
        self.column, self.setting = column, setting
        self.listed = plan.classification.labels
        self.smoothing = plan.training.label_smoothing_factor
        self.balanced = plan.classification.class_weights is ClassWeights.BALANCED
        self.names: list[str] = []
        self.weights: list[float] | None = None
        self._numbers: dict[str, int] = {}

    # ---- rows

    @abstractmethod
    def names_in(self, value: Any) -> list[str]:
        """Return the classes that the field's value means.

        Raises:
            BadRow: it can't be learned from.
        """

    has_classes = True
    width = 0
    """Of how many classes each row marks every one with 0 or 1; 0 where rows name their classes."""

    def vector_width(self, value: Any) -> int | None:
        """Return of how many classes a value marks each with 0 or 1; 0: that isn't sure; None: it never does."""
        return None

    def remarks(self, labels: Mapping[str, int]) -> list[str]:
        """Return what looks wrong with the classes found, for people."""
        return remarks_on(labels, are_listed=bool(self.listed))

    def prepare(self, summary: DataSummary, of_model: Sequence[str], *, least: int = 2) -> None:
        """Decide on the classes, their order and weights. `of_model` are those that the model has already.

        Raises:
            UserError: too few, too many, or in an order that contradicts the model's.
        """
        found = merged(summary.labels)
        self.names = choose_names(self.listed, found, of_model, self.column, self.setting, least=least)
        self.weights = balanced_weights(self.names, found) if self.balanced else None
        self._numbers = {name: number for number, name in enumerate(self.names)}

    @abstractmethod
    def target(self, value: Any) -> Target:
        """Return what the model should say of a field's value.

        Raises:
            BadRow: a class that isn't known.
        """

    def units(self, target: Target) -> float:
        """Return what a target counts in the loss."""
        return 1.0

    # ---- the model

    @abstractmethod
    def config_options(self) -> dict[str, Any]:
        """Return the settings of the model's config for such outputs."""

    # ---- computing

    @abstractmethod
    def losses(self, prediction: Prediction, smoothing: float) -> torch.Tensor:
        """Return each position's loss, [positions], times what it counts."""

    def weights_of(self, targets: torch.Tensor) -> torch.Tensor | None:
        """Return what each position counts, [positions]; None for 1 each."""
        return None

    @abstractmethod
    def sums(self, prediction: Prediction) -> dict[str, Sequence[float]]:
        """Return the counts that `scores` needs."""

    @abstractmethod
    def scores(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Turn counts of all data into metrics."""

    @abstractmethod
    def said(self, prediction: Prediction) -> list[tuple[str, str]]:
        """Return for each position what was expected and what was predicted, in words."""

    def assess(self, prediction: Prediction, indices: Sequence[int]) -> Assessment:
        """Assess predictions of one position per example. Its loss is without label smoothing: that is for training."""
        losses = self.losses(prediction, 0.0).double()
        weights = self.weights_of(prediction.targets)
        sums: dict[str, Sequence[float]] = {
            "loss": [float(losses.sum())],
            "units": [float(len(losses) if weights is None else weights.double().sum())],
            **self.sums(prediction),
        }
        outcomes = [
            Outcome(index, loss, expected, predicted)
            for index, loss, (expected, predicted) in zip(indices, losses.tolist(), self.said(prediction), strict=True)
        ]
        return Assessment(sums, outcomes)

    def metrics(self, assessment: Assessment) -> dict[str, float]:
        """Return `loss` (mean per unit) and the scores."""
        sums = assessment.sums
        units = sums["units"][0]
        return {"loss": sums["loss"][0] / units if units else 0.0, **self.scores(sums)}

    def confusion_of(self, assessment: Assessment) -> tuple[list[str], list[list[int]]] | None:
        """Return class names and how often each (row) was taken for each (column); None where that isn't known."""
        matrix = confusion_matrix(assessment.sums)
        return None if matrix is None else (self.names, matrix)


class SingleLabel(Objective):
    """One class each: cross entropy."""

    higher_is_better = frozenset({"accuracy", "f1", "precision", "recall", "mcc"})

    def names_in(self, value: Any) -> list[str]:
        return [name_of(value, self.column, self.listed)]

    def target(self, value: Any) -> int:
        return number_of(self.names_in(value)[0], self.column, self._numbers)

    def units(self, target: Target) -> float:
        assert isinstance(target, int)
        return self.weights[target] if self.weights else 1.0

    def config_options(self) -> dict[str, Any]:
        return {**config_options(self.names), "problem_type": "single_label_classification"}

    def _class_weights(self, like: torch.Tensor) -> torch.Tensor | None:
        return None if self.weights is None else like.new_tensor(self.weights)

    def losses(self, prediction: Prediction, smoothing: float) -> torch.Tensor:
        from torch.nn import functional

        return functional.cross_entropy(
            prediction.logits,
            prediction.targets,
            weight=self._class_weights(prediction.logits),
            reduction="none",
            label_smoothing=smoothing,
        )

    def weights_of(self, targets: torch.Tensor) -> torch.Tensor | None:
        import torch

        return None if self.weights is None else torch.tensor(self.weights, device=targets.device)[targets]

    def sums(self, prediction: Prediction) -> dict[str, Sequence[float]]:
        guesses = prediction.logits.argmax(-1)
        return {**class_sums(prediction.targets.cpu().numpy(), guesses.cpu().numpy(), len(self.names))}

    def scores(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        found = class_scores(sums)
        # with one class each, F1 of the summed counts is the accuracy
        return {"accuracy": found.pop("f1Micro"), **found, "mcc": matthews(sums)}

    def said(self, prediction: Prediction) -> list[tuple[str, str]]:
        parts, guesses = prediction.logits.softmax(-1).max(-1)
        return [
            (self.names[target], f"{self.names[guess]} ({part:.0%})")
            for target, guess, part in zip(prediction.targets.tolist(), guesses.tolist(), parts.tolist(), strict=True)
        ]


class MultiLabel(Objective):
    """Any number of classes each: binary cross entropy, the mean over classes.

    Class weights multiply a class's part, as `weight` of torch's BCEWithLogitsLoss does. Label smoothing moves both
    outcomes of a class toward one half.
    """

    higher_is_better = frozenset({"accuracy", "f1", "f1Micro", "precision", "recall"})

    def names_in(self, value: Any) -> list[str]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise BadRow(f"field {self.column!r} must be a list of classes, not {type(value).__name__}")
        width = self.width or self.vector_width(value)
        if width:
            if not _has_marks(value) or len(value) != width:
                raise BadRow(
                    f"field {self.column!r} must have a 0 or 1 for each of {width} classes, as other rows have"
                )
            if self.listed and len(self.listed) != width:
                raise BadRow(
                    f"field {self.column!r} marks {width} classes, and spec.classification.labels lists "
                    f"{len(self.listed)}"
                )
            value = [place for place, mark in enumerate(value) if float(mark)]
        return list(dict.fromkeys(name_of(one, self.column, self.listed) for one in value))

    def vector_width(self, value: Any) -> int:
        # a list of classes names none twice
        return len(value) if _has_marks(value) and len({float(mark) for mark in value}) < len(value) else 0

    def prepare(self, summary: DataSummary, of_model: Sequence[str], *, least: int = 1) -> None:
        self.width = summary.vector_width
        marked = {name_of(place, self.column, self.listed): 0 for place in range(self.width)}
        super().prepare(DataSummary({**marked, **summary.labels}), of_model, least=least)

    def target(self, value: Any) -> list[float]:
        marks = [0.0] * len(self.names)
        for name in self.names_in(value):
            marks[number_of(name, self.column, self._numbers)] = 1.0
        return marks

    def config_options(self) -> dict[str, Any]:
        return {**config_options(self.names), "problem_type": "multi_label_classification"}

    def losses(self, prediction: Prediction, smoothing: float) -> torch.Tensor:
        from torch.nn import functional

        targets = prediction.targets * (1 - smoothing) + smoothing / 2
        weight = None if self.weights is None else prediction.logits.new_tensor(self.weights)
        return functional.binary_cross_entropy_with_logits(
            prediction.logits, targets, weight=weight, reduction="none"
        ).mean(-1)

    def sums(self, prediction: Prediction) -> dict[str, Sequence[float]]:
        chosen = prediction.logits > 0  # a probability above one half
        counts = multi_label_sums(prediction.targets.cpu().numpy(), chosen.cpu().numpy())
        return {**counts, "examples": [float(len(chosen))]}

    def scores(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """`accuracy` is the part of the examples with all classes right (scikit-learn's subset accuracy)."""
        return {"accuracy": sums["exact"][0] / max(1.0, sums["examples"][0]), **class_scores(sums)}

    def said(self, prediction: Prediction) -> list[tuple[str, str]]:
        return list(zip(self._listed(prediction.targets), self._listed(prediction.logits), strict=True))

    def _listed(self, marks: torch.Tensor) -> list[str]:
        return [
            ", ".join(name for name, mark in zip(self.names, row, strict=True) if mark > 0) or "(none)"
            for row in marks.tolist()
        ]


class Regression(Objective):
    """A number each: squared error."""

    has_classes = False
    higher_is_better = frozenset({"pearson"})

    def __init__(self, plan: TrainingPlan, column: str, setting: str = "label") -> None:
        super().__init__(plan, column, setting)
        for given, field in (
            (self.smoothing, "spec.training.labelSmoothingFactor"),
            (self.balanced, "spec.classification.classWeights"),
            (self.listed, "spec.classification.labels"),
        ):
            if given:
                message = f"{field} belongs to classes, and problemType Regression has none: remove one of the two"
                raise UserError(Reason.INVALID_SPEC, message)

    def names_in(self, value: Any) -> list[str]:
        self.target(value)
        return []

    def prepare(self, summary: DataSummary, of_model: Sequence[str], *, least: int = 0) -> None:
        return None

    def target(self, value: Any) -> list[float]:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            shown = repr(value) if isinstance(value, str | int | float) else type(value).__name__
            raise BadRow(f"field {self.column!r} is not a number to predict but {shown[:60]}")
        return [number]

    def config_options(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def losses(self, prediction: Prediction, smoothing: float) -> torch.Tensor:
        return (prediction.logits - prediction.targets).square().sum(-1)

    def sums(self, prediction: Prediction) -> dict[str, Sequence[float]]:
        numbers = (tensor.squeeze(-1).cpu().numpy() for tensor in (prediction.targets, prediction.logits))
        return {"numbers": regression_sums(*numbers)}

    def scores(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        return regression_scores(sums["numbers"])

    def said(self, prediction: Prediction) -> list[tuple[str, str]]:
        pairs = zip(prediction.targets[:, 0].tolist(), prediction.logits[:, 0].tolist(), strict=True)
        return [(f"{target:g}", f"{guess:.4g}") for target, guess in pairs]


def _has_marks(value: Any) -> bool:
    """Whether it is a list of zeros and ones."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(mark, bool | int | float) and float(mark) in (0.0, 1.0) for mark in value)


def objective_for(plan: TrainingPlan, column: str) -> Objective:
    """Return the objective of the plan's problem type; `column` is the field that holds the target.

    Raises:
        UserError: settings that don't go together.
    """
    kinds: dict[ProblemType, Callable[[TrainingPlan, str], Objective]] = {
        ProblemType.SINGLE_LABEL: SingleLabel,
        ProblemType.MULTI_LABEL: MultiLabel,
        ProblemType.REGRESSION: Regression,
    }
    return kinds[plan.classification.problem_type](plan, column)


def load_with_head(auto_class: Any, folder: Path, seed: int, **options: Any) -> nn.Module:
    """Load a model with the head that `options` describe; where the folder has none that fits, the head is new.

    A new head is drawn from the job's seed: the same on every rank. It stays in full precision above a quantized body.

    Raises:
        UserError: transformers can't load it.
    """
    import torch

    from tunesmith_trainer.models.loading import load_pretrained

    if options.get("quantization_config") is not None:
        kept = _unquantized(auto_class, folder, seed)
        options["quantization_config"] = copy.deepcopy(options["quantization_config"])
        options["quantization_config"].llm_int8_skip_modules = kept
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = load_pretrained(auto_class, folder, ignore_mismatched_sizes=True, **options)
    return model


def _unquantized(auto_class: Any, folder: Path, seed: int) -> list[str]:
    """Return the modules that may be new, which bitsandbytes can't quantize: the head, and a pooler before it."""
    import torch

    from tunesmith_trainer.models.loading import from_config

    with torch.device("meta"):
        skeleton = from_config(auto_class, folder, seed, torch.float32)
    poolers = [name for name, _ in skeleton.named_modules() if name.rpartition(".")[2] == "pooler"]
    return sorted({*head_modules(skeleton), *poolers})


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of a loaded model's modules outside its body: what turns hidden states into classes.

    Adapters leave them whole and train all of their weights, since a new head has nothing to adapt.
    """
    body = getattr(model, "base_model_prefix", "")
    children = ((name, module) for name, module in model.named_children() if name != body)
    return [name for name, module in children if any(True for _ in module.parameters())]
