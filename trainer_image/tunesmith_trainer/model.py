"""Load the base model and its tokenizer; decide device and number format. Called by `loop` and `export`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_api.v1alpha1.training import Precision
from tunesmith_store.errors import UserError
from tunesmith_trainer.chat import ensure_chat_template

__all__ = ["Numerics", "load_base", "load_tokenizer", "pad_id", "stored_dtype"]


@dataclass(frozen=True)
class Numerics:
    """Where and in which number format one rank computes."""

    device: torch.device
    bf16: bool

    @classmethod
    def choose(cls, precision: Precision, gpus_per_worker: int) -> Numerics:
        """Resolve precision Auto: BF16 where a GPU computes it natively, else FP32.

        On a CPU without bf16 instructions BF16 works, slowly.

        Raises:
            UserError: a GPU was asked for and none is visible.
        """
        if gpus_per_worker and not torch.cuda.is_available():
            message = "spec.workers.gpusPerWorker: no GPU is visible in the pod; the trainer image may lack CUDA"
            raise UserError(Reason.INVALID_SPEC, message)
        device = torch.device("cuda" if gpus_per_worker else "cpu")
        auto = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return cls(device, precision is Precision.BF16 or (precision is Precision.AUTO and auto))

    def autocast(self) -> AbstractContextManager[Any] | None:
        """Return the context of the forward pass; None for full precision."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else None

    def weights_dtype(self, method: MethodType, stored: torch.dtype) -> torch.dtype:
        """Return the format of the weights: a frozen base may be short where nothing is lost, all else is float32."""
        frozen = method is MethodType.LORA and self.bf16 and stored is torch.bfloat16
        return torch.bfloat16 if frozen else torch.float32


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer, with a chat template (ChatML where it has none).

    Raises:
        UserError: it can't be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken folder makes transformers raise
        raise UserError(Reason.MODEL_INVALID, f"spec.model.uri: the tokenizer can't be loaded: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(Reason.MODEL_INVALID, "spec.model.uri: the tokenizer has no fast form (tokenizer.json)")
    if ensure_chat_template(tokenizer):
        print("the tokenizer has no chat template: using ChatML, which is saved with the model", flush=True)
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """Return a token id to pad with; it is masked wherever it is used."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the number format of the weights on disk: the tuned model is saved in the same."""
    from safetensors import safe_open

    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                kind = tensors.get_slice(key).get_dtype()
                if kind in names:
                    return names[kind]
    return torch.float32


def load_base(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load the causal language model on the CPU in the given number format.

    Raises:
        UserError: transformers can't load it.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # whatever a broken folder makes transformers raise
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise
        raise UserError(Reason.MODEL_INVALID, f"spec.model.uri: the model can't be loaded: {error}") from error
    model.config.use_cache = False
    return model
