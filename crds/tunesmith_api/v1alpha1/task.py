"""What a model can learn to do, and the settings that belong to one task only."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field

from tunesmith_api.model import NonNegative, SpecModel, cel

__all__ = [
    "AUTO_CLASSES",
    "ClassWeights",
    "Classification",
    "Generation",
    "MaskedLanguageModel",
    "Preference",
    "PreferenceLoss",
    "ProblemType",
    "Task",
    "Translation",
]


class Task(StrEnum):
    """What the model learns to do."""

    CHAT_SFT = "ChatSFT"
    CAUSAL_LM = "CausalLM"
    MASKED_LM = "MaskedLM"
    SEQUENCE_CLASSIFICATION = "SequenceClassification"
    TOKEN_CLASSIFICATION = "TokenClassification"  # noqa: S105 - a task, not a secret
    SEQ2SEQ = "Seq2Seq"
    DPO = "DPO"
    REWARD = "Reward"
    IMAGE_CLASSIFICATION = "ImageClassification"


AUTO_CLASSES: Final[Mapping[Task, str]] = {
    Task.CHAT_SFT: "AutoModelForCausalLM",
    Task.CAUSAL_LM: "AutoModelForCausalLM",
    Task.DPO: "AutoModelForCausalLM",
    Task.MASKED_LM: "AutoModelForMaskedLM",
    Task.SEQUENCE_CLASSIFICATION: "AutoModelForSequenceClassification",
    Task.TOKEN_CLASSIFICATION: "AutoModelForTokenClassification",
    Task.SEQ2SEQ: "AutoModelForSeq2SeqLM",
    Task.REWARD: "AutoModelForSequenceClassification",
    Task.IMAGE_CLASSIFICATION: "AutoModelForImageClassification",
}
"""The class of transformers that loads a task's model, for those who go on with it in Python."""


class ProblemType(StrEnum):
    """What a classifier's outputs mean."""

    SINGLE_LABEL = "SingleLabel"
    MULTI_LABEL = "MultiLabel"
    REGRESSION = "Regression"


class ClassWeights(StrEnum):
    """How much an example of each class counts."""

    NONE = "None"
    BALANCED = "Balanced"


class Classification(SpecModel):
    """Settings of SequenceClassification, TokenClassification and ImageClassification."""

    problem_type: ProblemType = Field(
        default=ProblemType.SINGLE_LABEL,
        description="SingleLabel: one class each. MultiLabel: a list of classes each. Regression: a number each. Only SequenceClassification has all three.",
    )
    labels: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]],
        Field(max_length=1000, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
    ] = Field(
        default_factory=list,
        description="Class names in the order of the model's outputs; leave it out to take those found in the training data, sorted.",
    )
    class_weights: ClassWeights = Field(
        default=ClassWeights.NONE,
        description="Balanced weighs a class by the inverse of its share in the training data (scikit-learn's formula).",
    )


class PreferenceLoss(StrEnum):
    """Loss over a preferred and a rejected answer."""

    SIGMOID = "Sigmoid"
    IPO = "IPO"


class Preference(SpecModel):
    """Settings of DPO."""

    beta: NonNegative = Field(default=0.1, description="How strongly the model is held to the one it started from.")
    loss_type: PreferenceLoss = Field(
        default=PreferenceLoss.SIGMOID,
        description="Sigmoid is DPO (Rafailov et al., 2023); IPO is its variant that doesn't overfit (Azar et al., 2023).",
    )


class MaskedLanguageModel(SpecModel):
    """Settings of MaskedLM."""

    mlm_probability: NonNegative = Field(
        default=0.15,
        description="Part of the tokens that the model has to guess; 80 % of them are masked, 10 % replaced, 10 % left (BERT).",
        json_schema_extra={
            "x-kubernetes-validations": [cel("self > 0.0 && self < 1.0", "mlmProbability must lie between 0 and 1")]
        },
    )


LanguageCode = Annotated[str, Field(min_length=2, max_length=32, pattern=r"^[A-Za-z][A-Za-z_-]*$")]


class Translation(SpecModel):
    """Languages of a model that translates between many (NLLB, mBART, M2M100), by the codes of its tokenizer."""

    source_language: LanguageCode = Field(
        description="Of the source texts: eng_Latn for NLLB, en_XX for mBART, en for M2M100."
    )
    target_language: LanguageCode = Field(
        description="Of the target texts. The tuned model writes it without being told."
    )


class Generation(SpecModel):
    """How answers are generated where an evaluation reads them (Seq2Seq; samples in the report)."""

    max_new_tokens: int = Field(default=64, ge=1, le=4096, description="Longest answer, in tokens.")
    num_beams: int = Field(default=1, ge=1, le=16, description="Beams of the search; 1 is greedy.")
