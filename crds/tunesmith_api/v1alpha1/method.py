"""How weights are trained: which of them, and what is done to them on the way (QAT, pruning, distillation)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import ConfigDict, Field

from tunesmith_api.model import NonNegative, SpecModel, Uri, cel
from tunesmith_api.v1alpha1.quantization import QuantizationMethod

__all__ = [
    "ADAPTER_METHODS",
    "Distillation",
    "LoraConfig",
    "Method",
    "MethodType",
    "Pruning",
    "PruningType",
    "QatScheme",
    "QuantType",
    "QuantizationAwareTraining",
    "QuantizedBase",
]


class MethodType(StrEnum):
    """Which weights are trained."""

    FULL = "Full"
    LORA = "LoRA"
    DORA = "DoRA"
    QLORA = "QLoRA"


ADAPTER_METHODS = frozenset({MethodType.LORA, MethodType.DORA, MethodType.QLORA})


class LoraConfig(SpecModel):
    """Low-rank adapters, with PEFT's names."""

    r: int = Field(default=16, ge=1, le=1024, description="Rank of the adapter matrices.")
    alpha: int = Field(
        default=32, ge=1, le=4096, description="Scale of the adapters: they are multiplied by alpha / r."
    )
    dropout: NonNegative = Field(
        default=0.0,
        description="Dropout before the adapters, from 0 to below 1.",
        json_schema_extra={"x-kubernetes-validations": [cel("self < 1.0", "dropout must be below 1")]},
    )
    use_rslora: bool = Field(
        default=False, description="Scale by alpha / sqrt(r) instead: steadier at high ranks (Kalajdzievski, 2023)."
    )
    target_modules: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]],
        Field(
            min_length=1, max_length=32, json_schema_extra={"x-kubernetes-list-type": "set", "default": ["all-linear"]}
        ),
    ] = Field(
        default_factory=lambda: ["all-linear"],
        description="Names of the layers that get an adapter; `all-linear` means every linear layer but the output head. Embeddings that are the output head, too (tie_word_embeddings), can get none.",
    )


class QuantType(StrEnum):
    """4-bit number formats of bitsandbytes."""

    NF4 = "nf4"
    FP4 = "fp4"


class QuantizedBase(SpecModel):
    """How QLoRA stores the frozen base model."""

    quant_type: QuantType = Field(default=QuantType.NF4, description="nf4 fits weights best (Dettmers et al., 2023).")
    use_double_quant: bool = Field(
        default=True, description="Quantize the quantization constants too: 0.4 bit less per weight."
    )


GGUF_GROUP: Final = 32
"""Weights that share a scale in Q8_0 and Q4_0."""


class QatScheme(StrEnum):
    """The quantization that is rehearsed."""

    INT8 = "Int8"
    INT4 = "Int4"


class QuantizationAwareTraining(SpecModel):
    """Train with the rounding that a later quantization will do, so that it loses less. Weights are saved unrounded."""

    scheme: QatScheme = Field(
        default=QatScheme.INT4,
        description="Int8 rehearses Q8_0, Int4 rehearses Q4_0: what a ModelDeployment of the result takes, with quantization.method Auto.",
    )
    group_size: int = Field(
        default=32,
        ge=16,
        le=256,
        multiple_of=16,
        description="Weights that share a scale; 32 is what GGUF uses, and no served format has other groups.",
    )

    @property
    def rehearses(self) -> QuantizationMethod | None:
        """The served format whose rounding this is, bit for bit; None where there is none."""
        if self.group_size != GGUF_GROUP:
            return None
        return QuantizationMethod.Q8_0 if self.scheme is QatScheme.INT8 else QuantizationMethod.Q4_0


class PruningType(StrEnum):
    """What is taken away."""

    MAGNITUDE = "Magnitude"
    LAYERS = "Layers"


class Pruning(SpecModel):
    """Take weights away before training, which then heals the loss."""

    type: PruningType = Field(
        default=PruningType.MAGNITUDE,
        description="Magnitude sets the smallest weights of each linear layer to zero and keeps them there; Layers removes whole layers, those that change their input least (Men et al., 2024: ShortGPT).",
    )
    sparsity_percent: int = Field(
        default=30, ge=1, le=95, description="Part of the weights (Magnitude) or of the layers (Layers) to take away."
    )


class Distillation(SpecModel):
    """Learn from a teacher's probabilities beside the data's own answers (Hinton et al., 2015)."""

    teacher_uri: Uri = Field(description="The teacher: a model of the same task and tokenizer.")
    temperature: NonNegative = Field(
        default=2.0,
        description="Softens both distributions.",
        json_schema_extra={"x-kubernetes-validations": [cel("self > 0.0", "temperature must be above 0")]},
    )
    alpha: NonNegative = Field(
        default=0.5,
        description="Weight of the teacher in the loss; the data has the rest.",
        json_schema_extra={"x-kubernetes-validations": [cel("self <= 1.0", "alpha is a part: at most 1")]},
    )


class Method(SpecModel):
    """How the weights are trained."""

    type: MethodType = Field(
        default=MethodType.LORA,
        description="Full trains all weights. LoRA and DoRA train small adapters. QLoRA trains them over a base model held in 4 bits.",
    )
    lora: LoraConfig | None = Field(
        default=None,
        description="Settings of the adapters; leave it out for PEFT's usual ones (r 16, alpha 32, all linear layers).",
    )
    quantized_base: QuantizedBase | None = Field(
        default=None, description="Settings of QLoRA's 4-bit base; leave it out for nf4 with double quantization."
    )
    qat: QuantizationAwareTraining | None = Field(
        default=None, description="Rehearse a later quantization; with method Full."
    )
    pruning: Pruning | None = Field(default=None, description="Take weights away; with method Full.")
    distillation: Distillation | None = Field(default=None, description="Learn from a teacher too.")

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "!has(self.lora) || self.type != 'Full'",
                    "method.lora belongs to method.type LoRA, DoRA or QLoRA: remove it or set type: LoRA",
                ),
                cel(
                    "!has(self.quantizedBase) || self.type == 'QLoRA'",
                    "method.quantizedBase belongs to method.type QLoRA: remove it or set type: QLoRA",
                ),
                cel(
                    "!(has(self.qat) || has(self.pruning)) || self.type == 'Full'",
                    "method.qat and method.pruning change the weights themselves: set method.type: Full",
                ),
                cel(
                    "!(has(self.qat) && has(self.pruning))",
                    "method.qat and method.pruning can't be had together: choose one",
                ),
            ]
        },
    )

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained instead of the weights."""
        return self.type in ADAPTER_METHODS
