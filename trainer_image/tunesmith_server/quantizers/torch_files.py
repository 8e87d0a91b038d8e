"""The family of weights that PyTorch itself unpacks, for language models on the engine Transformers.

torchao's 8 bits and bitsandbytes' NF4: safetensors that transformers loads again as they were, to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.predict.kinds import kind_of
from tunesmith_server.quantizers.base import PLAIN, Made, Options, types_in, weights_in
from tunesmith_server.quantizers.ignored import matching
from tunesmith_server.quantizers.onnx_files import OnnxQuantizer
from tunesmith_server.quantizers.safetensors_files import copy_others
from tunesmith_store.errors import UserError

__all__ = ["TorchQuantizer"]

TOOLS = ("torch", "torchao", "bitsandbytes", "transformers")


def _int8(ignored: list[str] | None = None) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=ignored)


def _int8_dynamic(ignored: list[str] | None = None) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig(version=2), modules_to_not_convert=ignored)


def _nf4(ignored: list[str] | None = None) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=ignored,
    )


_CONFIGS: Final[Mapping[QuantizationMethod, Callable[..., Any]]] = {
    QuantizationMethod.INT8: _int8,
    QuantizationMethod.INT8_DYNAMIC: _int8_dynamic,
    QuantizationMethod.NF4: _nf4,
}


class TorchQuantizer:
    """One source in the formats of torchao and bitsandbytes. Classifiers in 8 bits are `OnnxQuantizer`'s."""

    def __init__(self, source: Path, scratch: Path, threads: int) -> None:
        """Nothing is read yet."""
        self._source, self._scratch, self._threads = source, scratch, threads

    def make(self, method: QuantizationMethod, folder: Path, options: Options = PLAIN) -> Made:
        """Write safetensors and what lies beside them.

        Raises:
            UserError: the model is of another kind, or can't be held in this format.
        """
        kind = kind_of(self._source)
        if not kind.generates and method is QuantizationMethod.INT8:
            return OnnxQuantizer(self._source, self._scratch, self._threads).make(method, folder, options)
        if not kind.generates:
            message = f"the model is {kind}, and {method} is for language models: set spec.quantization.method: None"
            raise UserError(Reason.MODEL_INVALID, message)
        ignored = matching(self._source, options.ignore)
        copy_others(self._source, folder)
        self._save(method, folder, ignored)
        for path in folder.glob("*.safetensors"):
            _sort_header(path)
        return Made(
            weights=weights_in(self._source),
            tensor_types=types_in(folder),
            fallbacks={},
            tools={name: version(name) for name in TOOLS},
            ignored=ignored,
        )

    def _save(self, method: QuantizationMethod, folder: Path, ignored: Sequence[str]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(self._threads)
        try:
            left = [*ignored, *_usually_left(self._source)] if ignored else None
            model = AutoModelForCausalLM.from_pretrained(
                self._source,
                quantization_config=_CONFIGS[method](left),
                dtype=torch.float32,
                device_map="cpu",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
            model.save_pretrained(folder)
        except Exception as error:  # whatever a broken folder, or a shape that doesn't fit, makes these libraries raise
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                raise
            raise UserError(Reason.MODEL_INVALID, f"the model can't be held as {method}: {error}") from error


def _usually_left(source: Path) -> list[str]:
    """What the library leaves as it is unless it is given a list: the output layer, and what shares its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return list(get_keys_to_not_convert(AutoModelForCausalLM.from_config(config)))


def _sort_header(path: Path) -> None:
    """Bring what stands in a file's header into one order: the library's differs from run to run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
