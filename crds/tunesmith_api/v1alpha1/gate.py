"""What quantization may cost: `spec.evaluation` and `spec.gate` of a ModelDeployment, and the figures in its status.

`Evaluation` is what the quantize Job finds out: its termination report has it, an object beside the artefact keeps it,
and the status shows it as it is. `core.modeldeployment.gate` compares it with a `Gate`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from tunesmith_api.model import NonNegative, S3Uri, SpecModel, StatusModel, cel
from tunesmith_api.v1alpha1.quantization import QuantizationMethod

__all__ = ["Estimate", "Evaluation", "EvaluationSpec", "Figures", "Gate", "Metric", "OnGateFailure"]

SignedNumber = Annotated[str, Field(pattern=r"^-?[0-9]+(\.[0-9]+)?$", max_length=32)]
"""A number written as text: Kubernetes APIs carry no floats."""


class EvaluationSpec(SpecModel):
    """The held-out rows that unquantized and quantized model are compared by."""

    dataset: S3Uri | None = Field(
        default=None,
        description="Held-out rows as JSON Lines: of a language model chat rows ({messages: [...]}, the last one the reference answer), of a classifier {text, label}; a file, or a folder of .jsonl files. Leave it out to use dataset.eval of the FineTuneJob that the model comes from.",
    )
    max_examples: int = Field(
        default=200, ge=1, le=10_000, description="How many rows are compared, drawn by `seed`; the more, the surer."
    )
    seed: int = Field(default=0, ge=0, le=2_147_483_647, description="Which rows are drawn where there are more.")


class OnGateFailure(StrEnum):
    """What becomes of a revision that the gate holds back."""

    KEEP = "Keep"
    FALLBACK_METHOD = "FallbackMethod"


_LIMITS = (
    "maxPerplexityIncreasePercent",
    "maxAccuracyDropPercent",
    "minAgreementPercent",
    "minTokensPerSecond",
    "maxSizeBytes",
)


class Gate(SpecModel):
    """What a revision must keep to before it gets any traffic. Changing a limit judges again and quantizes nothing."""

    max_perplexity_increase_percent: NonNegative | None = Field(
        default=None,
        description="Most that the perplexity of the reference answers may rise, in percent of the unquantized model's: 5 lets 2.00 become 2.10.",
    )
    max_accuracy_drop_percent: NonNegative | None = Field(
        default=None,
        description="Most that accuracy (F1 where the answers are no labels) may fall, in percentage points and not in percent of what it was: 3 lets 80 % become 77 %.",
    )
    min_agreement_percent: NonNegative | None = Field(
        default=None, description="Least part of the rows that both models must answer word for word alike, in percent."
    )
    min_tokens_per_second: NonNegative | None = Field(
        default=None,
        description="Least speed of one answer, in tokens per second, with the CPUs of `resources` on the node that quantizes.",
    )
    max_size_bytes: int | None = Field(default=None, ge=1, description="Most bytes that the quantized file may have.")
    on_gate_failure: OnGateFailure = Field(
        default=OnGateFailure.KEEP,
        description="Keep: the revision fails, and what answers goes on answering. FallbackMethod: the same, and a revision with fallbackMethod is tried in its place.",
    )
    fallback_method: QuantizationMethod | None = Field(
        default=None, description="With FallbackMethod: the number format to try instead, for example Q8_0."
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    " || ".join(f"has(self.{name})" for name in _LIMITS),
                    f"a gate needs a limit: one of {', '.join(_LIMITS)}",
                ),
                cel(
                    "(self.onGateFailure == 'FallbackMethod') == has(self.fallbackMethod)",
                    "onGateFailure: FallbackMethod and fallbackMethod go together: give both or neither",
                ),
            ]
        },
    )

    @property
    def needs_rows(self) -> bool:
        """Whether a limit is about answers, which takes held-out rows."""
        limits = (self.max_perplexity_increase_percent, self.max_accuracy_drop_percent, self.min_agreement_percent)
        return any(limit is not None for limit in limits)


class Metric(StrEnum):
    """What `accuracyPercent` counts."""

    EXACT_MATCH = "ExactMatch"
    F1 = "F1"


class Estimate(StatusModel):
    """A figure of a sample, and the interval that has the true one in 95 of 100 samples."""

    value: SignedNumber = Field(description="As measured.")
    low: SignedNumber = Field(description="Lower end of the 95 % interval.")
    high: SignedNumber = Field(description="Upper end of the 95 % interval.")


class Figures(StatusModel):
    """One model, as served."""

    perplexity: SignedNumber | None = Field(default=None, description="Of the reference answers.")
    accuracy_percent: SignedNumber | None = Field(
        default=None, description="Answers that are right; F1 x 100 where they are no labels."
    )
    tokens_per_second: SignedNumber = Field(
        description="Of one answer, with no other under way; of a classifier, tokens that it reads."
    )
    size_bytes: int = Field(ge=0, description="Of the model's files.")
    memory_bytes: int = Field(ge=0, description="Resident memory of the process that has answered all rows.")


class Evaluation(StatusModel):
    """Unquantized and quantized model on the same held-out rows, both as served."""

    examples: int = Field(ge=0, description="Rows that were compared.")
    skipped: int = Field(default=0, ge=0, description="Rows that don't fit into engine.contextLength.")
    metric: Metric | None = Field(
        default=None,
        description="What accuracyPercent counts: ExactMatch where the reference answers are labels, else F1 of words.",
    )
    baseline: Figures = Field(description="The unquantized model.")
    quantized: Figures = Field(description="The model as this revision serves it.")
    perplexity_increase_percent: Estimate | None = Field(
        default=None, description="In percent of the unquantized model's perplexity; negative where it fell."
    )
    accuracy_drop_percent: Estimate | None = Field(
        default=None, description="In percentage points; negative where accuracy rose."
    )
    agreement_percent: Estimate | None = Field(default=None, description="Rows that both answer word for word alike.")
    dataset_digest: str = Field(default="", description="sha256 of the rows.")
    report_uri: str = Field(default="", alias="reportURI", description="The comparison as a page, in the object store.")
