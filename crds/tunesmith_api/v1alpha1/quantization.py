"""How a served model's weights are made smaller: `spec.quantization` of a ModelDeployment."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from tunesmith_api.model import SpecModel

__all__ = ["Quantization", "QuantizationMethod"]


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
