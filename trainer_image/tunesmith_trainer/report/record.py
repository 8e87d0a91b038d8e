"""All that a finished run knows of itself, as one JSON document: what the report, the model card and tools read.

`loop` fills a `RunRecord` on rank 0 at the end; `page` draws it, `card` writes the model card from it. It is saved as
`report.json` beside the report, so that a report can be drawn again without the run.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib import metadata
from typing import TYPE_CHECKING, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from tunesmith_api.model import Contract
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.task import ProblemType, Task
from tunesmith_trainer.report.settings import method_name, settings_of

if TYPE_CHECKING:
    from tunesmith_trainer.data.statistics import DataStatistics

__all__ = [
    "Checkpoint",
    "ClassCount",
    "Confusion",
    "Data",
    "Environment",
    "Evaluation",
    "Histogram",
    "HistoryPoint",
    "Incident",
    "IncidentKind",
    "PlanFacts",
    "RunRecord",
    "Sample",
    "SavedModel",
    "WorstExample",
    "installed_versions",
]

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "ray", "datasets", "tokenizers")
"""Packages whose versions can change a result."""


class _Part(Contract):
    """Numbers that aren't finite survive the way through JSON: as the texts NaN and Infinity."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid", ser_json_inf_nan="strings"
    )


class PlanFacts(_Part):
    """What was asked for."""

    name: str
    task: Task
    method: str = Field(description="Short, for example LoRA, or Full with pruning.")
    problem_type: ProblemType = ProblemType.SINGLE_LABEL
    base_model: str
    base_revision: str | None = None
    train_data: str
    eval_data: str | None = Field(default=None, description="URI, or how much of the training data was held out.")
    adapter_only: bool = Field(default=False, description="Whether the folder holds an adapter and no full model.")
    max_length: int
    max_grad_norm: float = 0.0
    metric_for_best: str = "loss"
    settings: dict[str, str] = Field(default_factory=dict, description="Spec fields by their dotted names, as text.")

    @classmethod
    def of(cls, plan: TrainingPlan) -> PlanFacts:
        """Take what a report shows from the plan; the rows of an inline data set are left out."""
        dataset = plan.dataset
        held_out = dataset.eval.name if dataset.eval else None
        if dataset.split_percent is not None:
            held_out = f"part of the training data (splitPercent: {dataset.split_percent})"
        return cls(
            name=plan.name,
            task=plan.task,
            method=method_name(plan.method),
            problem_type=plan.classification.problem_type,
            base_model=plan.model_uri,
            base_revision=plan.model_revision,
            train_data=dataset.train.name,
            eval_data=held_out,
            adapter_only=plan.publishes_adapter_only,
            max_length=plan.training.max_length,
            max_grad_norm=plan.training.max_grad_norm,
            metric_for_best=plan.training.metric_for_best_model,
            settings=settings_of(plan),
        )


class HistoryPoint(_Part):
    """One recorded optimizer step. Fields that a newer loop adds are passed over."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore", ser_json_inf_nan="strings"
    )

    step: int
    loss: float = Field(description="Mean per unit over the whole global batch.")
    learning_rate: float
    grad_norm: float | None = Field(default=None, description="Before clipping.")
    tokens: float = Field(description="Tokens of the global batch, learned or not.")
    seconds: float
    memory_bytes: int | None = Field(default=None, description="Memory that rank 0 holds, at its highest.")


class Evaluation(_Part):
    """Metrics on the held-out data after `step` optimizer steps."""

    step: int
    metrics: dict[str, float]

    @classmethod
    def of(cls, record: Mapping[str, float]) -> Evaluation:
        """Take a flat record: `step`, and metrics by name."""
        return cls(step=int(record["step"]), metrics={name: value for name, value in record.items() if name != "step"})


class Histogram(_Part):
    """Counts between edges: `counts[i]` lie in [edges[i], edges[i + 1])."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError("a histogram has one edge more than counts")
        return self

    @property
    def total(self) -> int:
        """How many values were counted."""
        return sum(self.counts)


class ClassCount(_Part):
    """How often a class occurs."""

    label: str
    train: int = 0
    held_out: int = 0


class Data(_Part):
    """What the data turned out to hold."""

    train_examples: int | None = Field(default=None, description="None where the data was streamed.")
    eval_examples: int = 0
    bad_rows: int = 0
    first_bad_row: str = ""
    duplicates: int = 0
    truncated: int = Field(default=0, description="Training examples that maxLength cut.")
    nothing_left: int = Field(default=0, description="Training examples left out since the cut left nothing to learn.")
    train_tokens: int | None = None
    learned_tokens: int = Field(
        default=0, description="Training tokens that the loss counts; 0 where none are learned."
    )
    learned_turns: int = Field(default=0, description="Turns of the assistant that are learned.")
    unlearned_turns: int = Field(default=0, description="Those that are not: cut off, or hidden by the chat template.")
    remarks: tuple[str, ...] = Field(default=(), description="What looks wrong with the data, and what was done to it.")
    first_example: tuple[tuple[str, bool], ...] = Field(
        default=(), description="The first training example in pieces, and whether each is learned."
    )
    lengths: Histogram | None = Field(default=None, description="Lengths of the training examples in tokens.")
    classes: tuple[ClassCount, ...] = Field(default=(), description="In the order of the model's outputs.")

    @classmethod
    def of(cls, statistics: DataStatistics, labels: Sequence[str] = ()) -> Data:
        """Take what `data.prepare` has counted.

        Args:
            statistics: of the training and the held-out set.
            labels: the classes in the order of the model's outputs; left out: by their names.
        """
        train, held_out = statistics.train, statistics.eval
        trained, evaluated = (train.classes if train else {}), (held_out.classes if held_out else {})
        return cls(
            train_examples=train.examples if train else None,
            eval_examples=held_out.examples if held_out else 0,
            bad_rows=statistics.bad_rows,
            first_bad_row=statistics.first_bad_row,
            duplicates=statistics.duplicates,
            truncated=train.truncated if train else 0,
            nothing_left=train.skipped if train else 0,
            train_tokens=train.tokens if train else None,
            learned_tokens=train.learned_tokens if train else 0,
            learned_turns=train.learned_turns if train else 0,
            unlearned_turns=train.unlearned_turns if train else 0,
            remarks=statistics.remarks
            + tuple(
                f"in {count:,} training examples: {note}" for note, count in (train.notes if train else {}).items()
            ),
            first_example=statistics.first_example,
            lengths=Histogram(edges=train.length_edges, counts=train.length_counts) if train else None,
            classes=tuple(
                ClassCount(label=label, train=trained.get(label, 0), held_out=evaluated.get(label, 0))
                for label in labels or sorted({*trained, *evaluated})
            ),
        )


class Confusion(_Part):
    """`counts[i][j]`: examples of class i that the model called class j."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        size = len(self.labels)
        if len(self.counts) != size or any(len(row) != size for row in self.counts):
            raise ValueError("a confusion matrix has a row and a column for each label")
        return self


class WorstExample(_Part):
    """A held-out example that the model got wrong, the worst first."""

    text: str
    text_pair: str | None = None
    expected: str
    predicted: str
    loss: float
    attributions: tuple[tuple[str, float], ...] = Field(
        default=(), description="(token, score): how much it spoke for what was predicted; below 0: against it."
    )


class Sample(_Part):
    """A held-out prompt and its answers."""

    prompt: str
    expected: str
    before: str | None = None
    after: str | None = None


class IncidentKind(StrEnum):
    """What happened on the way."""

    ROLLBACK = "Rollback"
    RESTART = "Restart"
    EARLY_STOP = "EarlyStop"


class Incident(_Part):
    """One thing that happened on the way."""

    step: int
    kind: IncidentKind = IncidentKind.ROLLBACK
    message: str


class Environment(_Part):
    """Where and how fast."""

    versions: dict[str, str] = Field(default_factory=dict)
    device: str = "cpu"
    workers: int = Field(default=1, description="Training processes, over all workers.")
    precision: str = "FP32"
    strategy: str = "DDP"
    trained_parameters: int | None = None
    total_parameters: int | None = None
    train_seconds: float | None = Field(default=None, description="Time spent in optimizer steps.")
    wall_seconds: float | None = Field(default=None, description="From the first start to the end.")


class Checkpoint(_Part):
    """A checkpoint that is kept."""

    step: int
    uri: str
    best: bool = False


class SavedModel(_Part):
    """The tuned model."""

    uri: str
    digest: str = Field(default="", description="Of the files without the report, which can't contain its own digest.")
    size_bytes: int = 0
    step: int | None = Field(default=None, description="Optimizer steps behind these weights; None: the last step's.")
    dtype: str = Field(default="", description="Number format of the weights; empty for an adapter alone.")
    rounding: str = Field(default="", description="What that format costs or saves in weights, for people.")
    metrics: dict[str, float] | None = Field(
        default=None, description="Metrics on the held-out data of the model as it was written, read back."
    )


class RunRecord(_Part):
    """One run, from the question to the answer."""

    schema_version: Literal[1] = 1
    plan: PlanFacts
    run_digest: str = ""
    pipeline_tag: str = "text-generation"
    higher_is_better: tuple[str, ...] = ()
    metrics: dict[str, float] = Field(default_factory=dict, description="Final metrics as in the job's status.")
    history: tuple[HistoryPoint, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    data: Data = Field(default_factory=Data)
    confusion: Confusion | None = None
    worst: tuple[WorstExample, ...] = ()
    samples: tuple[Sample, ...] = ()
    incidents: tuple[Incident, ...] = ()
    environment: Environment = Field(default_factory=Environment)
    checkpoints: tuple[Checkpoint, ...] = ()
    model: SavedModel | None = None

    @classmethod
    def of(
        cls,
        plan: TrainingPlan,
        *,
        run_digest: str = "",
        metrics: Mapping[str, float] | None = None,
        history: Sequence[Mapping[str, float]] = (),
        evaluations: Sequence[Mapping[str, float]] = (),
    ) -> RunRecord:
        """Make a record from what the loop keeps; add the rest with `model_copy(update={...})`.

        Args:
            plan: the run's plan.
            run_digest: digest of plan and inputs.
            metrics: final metrics by name.
            history: records with the (camelCase) fields of `HistoryPoint`.
            evaluations: flat records: `step`, and metrics by name.
        """
        return cls(
            plan=PlanFacts.of(plan),
            run_digest=run_digest,
            metrics=dict(metrics or {}),
            history=tuple(HistoryPoint.model_validate(point) for point in history),
            evaluations=tuple(map(Evaluation.of, evaluations)),
        )

    @property
    def counts_entities(self) -> bool:
        """Whether precision, recall and F1 are those of whole entities."""
        from tunesmith_trainer.tasks.scores import has_spans

        labels = self.confusion.labels if self.confusion else tuple(item.label for item in self.data.classes)
        return self.plan.task is Task.TOKEN_CLASSIFICATION and has_spans(labels)

    @property
    def before(self) -> Evaluation | None:
        """The evaluation before the first step."""
        return next((found for found in self.evaluations if found.step == 0), None)

    @property
    def after(self) -> Evaluation | None:
        """The evaluation of the model that was saved: as it was written, where that was measured."""
        working = self.working
        if self.model is None or self.model.metrics is None:
            return working
        step = self.model.step if self.model.step is not None else working.step if working else 0
        return Evaluation(step=step, metrics=self.model.metrics)

    @property
    def working(self) -> Evaluation | None:
        """The evaluation, in training, of the weights that were saved."""
        done = [found for found in self.evaluations if found.step > 0]
        step = self.model.step if self.model else None
        return next((found for found in done if found.step == step), done[-1] if done else None)


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a result."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
