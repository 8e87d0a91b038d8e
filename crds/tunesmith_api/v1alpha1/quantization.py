"""How a served model's weights are made smaller: `spec.quantization` of a ModelDeployment."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import ConfigDict, Field

from tunesmith_api.model import S3Uri, SpecModel, cel

__all__ = ["CALIBRATED_METHODS", "Calibration", "ModulePattern", "Quantization", "QuantizationMethod"]


class QuantizationMethod(StrEnum):
    """Number format of the served weights."""

    AUTO = "Auto"
    NONE = "None"
    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q5_K_M = "Q5_K_M"
    Q4_K_M = "Q4_K_M"
    Q4_0 = "Q4_0"
    Q3_K_M = "Q3_K_M"
    Q2_K = "Q2_K"
    INT8 = "Int8"
    INT8_DYNAMIC = "Int8Dynamic"
    NF4 = "NF4"


CALIBRATED_METHODS: Final = (
    QuantizationMethod.Q6_K,
    QuantizationMethod.Q5_K_M,
    QuantizationMethod.Q4_K_M,
    QuantizationMethod.Q4_0,
    QuantizationMethod.Q3_K_M,
    QuantizationMethod.Q2_K,
)
"""Methods whose rounding an importance matrix changes."""

ModulePattern = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.*?-]+$")]
"""Name of a module as in the model's safetensors, without `.weight`; `*` is any text, `?` any character."""


class Calibration(SpecModel):
    """Texts that an importance matrix is computed from: which inputs of each layer are large, and so which weights matter."""

    dataset: S3Uri | None = Field(
        default=None,
        description="Chat rows ({messages: [...]}) or texts ({text: ...}) as JSON Lines: a file, or a folder of .jsonl files. Leave it out to use dataset.train of the FineTuneJob that the model comes from. Rows that stand in the evaluation's, too, are left out.",
    )
    max_examples: int = Field(
        default=128,
        ge=1,
        le=4096,
        description="How many rows are used, drawn by `seed`; of each the first 2048 tokens.",
    )
    seed: int = Field(default=0, ge=0, le=2_147_483_647, description="Which rows are drawn where there are more.")


class Quantization(SpecModel):
    """How the weights are made smaller before they are served."""

    method: QuantizationMethod = Field(
        default=QuantizationMethod.AUTO,
        description=(
            "Auto: Q8_0 on LlamaCpp, None on Transformers and VLLM. Q8_0: 8 bits per weight, half the memory of 16-bit weights at "
            "no measurable loss. Fewer bits, less memory, answers that differ more: Q6_K, Q5_K_M, Q4_K_M, Q4_0, Q3_K_M, "
            "Q2_K. None: the weights as they are. On Transformers: Int8, 8 bits per weight (ONNX Runtime for "
            "classifiers and encoders, torchao for language models); of language models also Int8Dynamic (torchao, "
            "activations in 8 bits, too) and NF4 (bitsandbytes, 4 bits). status.revisions[].bitsPerWeight says what a method came to."
        ),
    )
    calibration: Calibration | None = Field(
        default=None,
        description="Round the weights by an importance matrix of these texts; {} takes the FineTuneJob's training data. For the K-quants and Q4_0. Leave it out for none, which is what QAT has rehearsed.",
    )
    ignore: Annotated[
        list[ModulePattern],
        Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = Field(
        default_factory=list,
        description="Modules whose weights stay as they are, by the names in the model's safetensors: lm_head, model.layers.0.*, *.down_proj. Each must match one.",
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    f"!has(self.calibration) || self.method in {[it.value for it in CALIBRATED_METHODS]}",
                    f"quantization.calibration goes with method {', '.join(CALIBRATED_METHODS)}: name one of them, or "
                    "leave it out",
                ),
                cel(
                    "!has(self.ignore) || self.ignore.size() == 0 || self.method != 'None'",
                    "quantization.ignore keeps modules from being quantized, and method None quantizes none: leave it out",
                ),
            ]
        },
    )
