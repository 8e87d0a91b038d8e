"""Where and in which number format a rank computes. Decided by `assembly`, asked by all that handle weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_api.v1alpha1.training import Precision
from tunesmith_store.errors import UserError
from tunesmith_store.memory import peak_resident_bytes

__all__ = ["Numerics", "dtype_of"]

_DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}


@dataclass(frozen=True)
class Numerics:
    """Where and in which number format one rank computes."""

    device: torch.device
    precision: Precision = Precision.FP32
    """Never Auto."""

    @classmethod
    def choose(cls, precision: Precision, gpus_per_worker: int) -> Numerics:
        """Resolve precision Auto: BF16 where a GPU computes it natively, else FP32.

        On a CPU without bf16 instructions BF16 works, slowly.

        Raises:
            UserError: a GPU was asked for and none is visible; or FP16 without a GPU.
        """
        if gpus_per_worker and not torch.cuda.is_available():
            message = "spec.workers.gpusPerWorker: no GPU is visible in the pod; the trainer image may lack CUDA"
            raise UserError(Reason.INVALID_SPEC, message)
        device = torch.device("cuda" if gpus_per_worker else "cpu")
        if precision is Precision.AUTO:
            native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            precision = Precision.BF16 if native else Precision.FP32
        if precision is Precision.FP16 and device.type == "cpu":
            message = "spec.training.precision FP16 needs a GPU: set it to Auto, or workers.gpusPerWorker to 1"
            raise UserError(Reason.INVALID_SPEC, message)
        return cls(device, precision)

    @property
    def name(self) -> str:
        """What logs and reports call it: bf16, fp16 or fp32."""
        return self.precision.value.lower()

    @property
    def compute_dtype(self) -> torch.dtype:
        """The format of matrix products and activations."""
        return _DTYPES[self.precision]

    @property
    def is_short(self) -> bool:
        """Whether that has 16 bits."""
        return self.precision is not Precision.FP32

    @property
    def bytes_per_activation(self) -> int:
        """Bytes of a number of the forward pass."""
        return self.compute_dtype.itemsize

    def autocast(self) -> AbstractContextManager[Any] | None:
        """Return the context of the forward pass; None for full precision."""
        return torch.autocast(self.device.type, dtype=self.compute_dtype) if self.is_short else None

    def scaler(self) -> torch.amp.GradScaler | None:
        """Return what keeps small gradients from vanishing in fp16 (Micikevicius et al., 2018); None elsewhere."""
        return torch.amp.GradScaler(self.device.type) if self.precision is Precision.FP16 else None

    def weights_dtype(self, method: MethodType, stored: torch.dtype) -> torch.dtype:
        """Return the format of the weights: that of frozen ones below adapters, and float32 where all are trained."""
        return torch.float32 if method is MethodType.FULL else self.frozen_dtype(stored)

    def frozen_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Return the format of weights that aren't trained: short where nothing is lost by it, else float32."""
        return stored if self.is_short and stored is self.compute_dtype else torch.float32

    def used_bytes(self) -> int:
        """Return the most memory that this process has held so far: of the GPU, or resident on a CPU."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return peak_resident_bytes()


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the number format of that name; Auto has none."""
    return _DTYPES[precision]
