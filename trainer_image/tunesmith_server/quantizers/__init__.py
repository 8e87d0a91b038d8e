"""How weights are made smaller: one module a family, behind the protocol of `base`. Called by `builder`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.quantizers.gguf_files import GgufQuantizer
from tunesmith_server.quantizers.safetensors_files import SafetensorsQuantizer
from tunesmith_server.quantizers.torch_files import TorchQuantizer

if TYPE_CHECKING:
    from tunesmith_server.quantizers.base import Quantizer

__all__ = ["quantizer_of"]

_LLAMA_CPP: Final[dict[QuantizationMethod, type[Quantizer]]] = {
    QuantizationMethod.NONE: GgufQuantizer,
    QuantizationMethod.Q8_0: GgufQuantizer,
    QuantizationMethod.Q6_K: GgufQuantizer,
    QuantizationMethod.Q5_K_M: GgufQuantizer,
    QuantizationMethod.Q4_K_M: GgufQuantizer,
    QuantizationMethod.Q4_0: GgufQuantizer,
    QuantizationMethod.Q3_K_M: GgufQuantizer,
    QuantizationMethod.Q2_K: GgufQuantizer,
}
_TRANSFORMERS: Final[dict[QuantizationMethod, type[Quantizer]]] = {
    QuantizationMethod.NONE: SafetensorsQuantizer,
    QuantizationMethod.INT8: TorchQuantizer,
    QuantizationMethod.INT8_DYNAMIC: TorchQuantizer,
    QuantizationMethod.NF4: TorchQuantizer,
}


def quantizer_of(engine: EngineType, method: QuantizationMethod) -> type[Quantizer]:
    """Return the family that makes files of this method for an engine."""
    return (_LLAMA_CPP if engine is EngineType.LLAMA_CPP else _TRANSFORMERS)[method]
