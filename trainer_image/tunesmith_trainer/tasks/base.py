"""What a task is: from a row to an example, from examples to a batch, from a batch to a loss and to metrics.

One module of this package per family of tasks; `tasks.task_for` finds the one of a plan. `data` calls `check_row` and
`encode`, `step` calls `loss`, `evaluation` calls `assess` and `metrics`, `assembly` calls `load_model`. A task knows
nothing of ranks, stores, Ray or the optimizer.

Every loss is a SUM over units (tokens, examples, pairs). `step` divides by the number of units of the whole step over
all ranks and micro-batches: so the result depends neither on how many workers share a batch nor on how it is cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.plan import TrainingPlan

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["IGNORE", "Assessment", "BadRow", "Batch", "DataSummary", "Example", "Outcome", "Prediction", "Row", "Task"]

IGNORE = -100
"""Label of a position that is no part of the loss."""

Row = Mapping[str, Any]
"""One row as it was read: field name → plain JSON data."""


class BadRow(ValueError):
    """A row can't be used. The message goes behind "FILE line N " and says what is wrong and what to do."""


@dataclass(frozen=True)
class Example:
    """One encoded example. Features are lists of int or float, or nested lists; names are the model's argument names.

    `evaluation` adds the feature `index` (int), the example's place in its set; `collate` puts it into
    `Batch.extras["indices"]`, for `Outcome.index`.
    """

    features: Mapping[str, Any]
    length: int
    """Tokens that it costs to compute."""
    units: float
    """What its loss is divided by: learned tokens, or 1 (its class weight) for a class. 0 means: nothing to learn."""
    truncated: bool = False
    """Whether maxLength cut something off."""
    turns: int = 0
    """Of a conversation: the assistant's turns that are learned."""
    unlearned_turns: int = 0
    """Those that are not: cut off, or hidden by the chat template."""
    notes: tuple[str, ...] = ()
    """What was done to the row so that it can be learned, for people: few different texts."""
    epoch: int = 0
    """Which pass over the data this is: what a task draws at random (MaskedLM's masks) is drawn anew in each.
    Evaluation stays at 0, so it always draws the same."""


@dataclass(frozen=True)
class DataSummary:
    """What a task has to know of the training data before it encodes: collected over all rows."""

    labels: Mapping[str, int] = field(default_factory=dict)
    """How often each class occurs, by its name."""
    vector_width: int = 0
    """Of how many classes each row marks every one with 0 or 1; 0 where rows name their classes."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device. `inputs` are the model's arguments; what only the loss needs is in `extras`."""

    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor
    units: float
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """Logits where they count, and what they should be.

    logits: [positions, classes] float32. targets: [positions] class numbers (IGNORE allowed), or [positions, classes]
    for multi-label and regression. weights: [positions], how much each counts; None for 1 each. examples: [positions],
    which example of the batch a position belongs to; None where there is one position per example, in order.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None = None
    examples: torch.Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """How the model did on one held-out example: for the report's table of worst examples. Short texts."""

    index: int
    loss: float
    expected: str
    predicted: str


@dataclass(frozen=True)
class Assessment:
    """What an evaluation adds up over batches and ranks."""

    sums: Mapping[str, Sequence[float]]
    """Name → additive numbers, of equal length on all ranks: counts, summed losses, a flattened confusion matrix."""
    outcomes: Sequence[Outcome] = ()
    texts: Sequence[tuple[str, str]] = ()
    """(produced, expected) texts, where the metric needs them all together (BLEU, ROUGE)."""


class Task(ABC):
    """One task of one plan. Made by `tasks.task_for`; `prepare` is called once before anything is encoded."""

    def __init__(self, plan: TrainingPlan) -> None:
        self.plan = plan
        self.processor: Any = None

    # ---- rows (no torch: the driver's preflight uses these before any worker runs)

    @abstractmethod
    def check_row(self, row: Row) -> None:
        """Check that a row has what this task needs, by the columns of the plan.

        Raises:
            BadRow: it hasn't.
        """

    def normalized(self, row: Row) -> Row:
        """Check a row, and return it in the one form that all other methods read; most rows are in it already.

        Raises:
            BadRow: it hasn't what this task needs.
        """
        self.check_row(row)
        return row

    def labels_of(self, row: Row) -> Sequence[str]:
        """Return the class names that a checked row mentions; empty for tasks without classes."""
        return ()

    has_classes = False
    """Whether rows name classes."""

    def vector_width(self, row: Row) -> int | None:
        """Return of how many classes a checked row marks each with 0 or 1; 0: that isn't sure; None: it never does."""
        return None

    def expect_vectors(self, width: int) -> None:
        """Take note that each row marks every one of so many classes; before `labels_of` is asked."""
        return

    def remarks(self, labels: Mapping[str, int]) -> list[str]:
        """Return what looks wrong with the classes found in the training data, for people."""
        return []

    def texts_of(self, row: Row) -> Mapping[str, str]:
        """Return the free texts of a checked row that augmentation may change: column → text. Empty: none."""
        return {}

    def with_texts(self, row: Row, texts: Mapping[str, str]) -> Row:
        """Return the row with the texts of `texts_of` replaced by these."""
        return {**row, **texts}

    # ---- setting up

    @abstractmethod
    def load_processor(self, folder: Path) -> Any:
        """Load tokenizer or image processor from the model's folder; also kept as `self.processor`.

        Raises:
            UserError: it can't be loaded.
        """

    def prepare(self, summary: DataSummary) -> None:
        """Take note of what the training data holds, for example its classes."""
        return

    @abstractmethod
    def encode(self, row: Row) -> list[Example]:
        """Turn a checked row into examples: usually one; several where a long text is cut; none where nothing is left.

        Raises:
            BadRow: it can't be encoded.
        """

    @abstractmethod
    def load_model(self, folder: Path, **options: Any) -> nn.Module:
        """Load the model with this task's head. `options` go to `from_pretrained` (dtype, quantization, attention).

        Raises:
            UserError: transformers can't load it.
        """

    def head_modules(self, model: nn.Module) -> Sequence[str]:
        """Return the names of a loaded model's modules that adapters leave whole: a new head trains all its weights."""
        return ()

    # ---- computing

    @abstractmethod
    def collate(self, examples: Sequence[Example], device: torch.device, packed: bool) -> Batch:
        """Make a micro-batch. `packed`: without padding (only where `supports_packing`)."""

    @property
    def longest(self) -> int:
        """Most tokens of one example: what a worker computes at once costs no more than microBatchSize of those."""
        return self.plan.training.max_length

    supports_packing = False
    """Whether `collate` can lay examples end to end."""

    learns_tokens = False
    """Whether an example's units are learned tokens."""

    def pieces_of(self, example: Example) -> list[tuple[str, bool]]:
        """Return an example's text in pieces, and whether each is learned; empty where that isn't told by tokens."""
        return []

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Run the model forward and return logits where they count. Tasks without such leave it out."""
        raise NotImplementedError(f"{self.plan.task} has no logits to predict")

    def loss_of(self, prediction: Prediction) -> torch.Tensor:
        """Return the loss of a prediction, summed over units: cross entropy with the plan's label smoothing."""
        from torch.nn import functional

        losses = functional.cross_entropy(
            prediction.logits,
            prediction.targets,
            ignore_index=IGNORE,
            reduction="none",
            label_smoothing=self.plan.training.label_smoothing_factor,
        )
        return (losses if prediction.weights is None else losses * prediction.weights).sum()

    def freeze_reference(self, model: nn.Module, is_shared: bool = False) -> nn.Module | None:
        """Take note of the model as it starts, before anything is restored or trained. DPO keeps a reference.

        Returns:
            A frozen model that the loss needs beside it, if it does. With `is_shared` it has the model's own tensors,
            until both are shared out over the ranks.
        """
        return None

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss summed over the batch's units, with its graph."""

    @abstractmethod
    def assess(self, model: nn.Module, batch: Batch) -> Assessment:
        """Evaluate one batch without gradients. Sums always hold `loss` and `units`."""

    @abstractmethod
    def metrics(self, assessment: Assessment) -> dict[str, float]:
        """Turn the sums over all held-out data into metrics. Always holds `loss` (mean per unit)."""

    def confusion_of(self, assessment: Assessment) -> tuple[list[str], list[list[int]]] | None:
        """Return class names and the confusion matrix (rows: the true class); None for tasks without classes."""
        return None

    higher_is_better: frozenset[str] = frozenset()
    """The metrics of which more is better; of all others less is."""

    # ---- the end

    pipeline_tag = "text-generation"
    """What the model card calls it, by the Hub's names."""
