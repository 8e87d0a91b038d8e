"""What the `builder` asks of a family of number formats. A family is one module of this package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

from tunesmith_api.artifacts import CalibrationFacts, ModelShape
from tunesmith_api.model import digest_of
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.calibration.texts import Texts
from tunesmith_store.weights import stored_tensors

__all__ = ["PLAIN", "Made", "Options", "Quantizer", "types_in", "weights_in"]

CALIBRATION_WAY = 1
"""Counts up when the same rows begin to give another importance matrix on purpose."""


@dataclass(frozen=True)
class Options:
    """What a method is made with, beyond its name."""

    ignore: tuple[str, ...] = ()
    """Patterns of the modules that are left as they are."""
    texts: Texts | None = None
    """Rows to compute an importance matrix from."""

    @property
    def variant(self) -> str:
        """Tells artefacts of one method and source apart; "" where there is nothing to tell."""
        if self == PLAIN:
            return ""
        rows = [self.texts.digest, CALIBRATION_WAY] if self.texts is not None else []
        return digest_of([sorted(self.ignore), rows])


PLAIN = Options()


@dataclass(frozen=True)
class Made:
    """What a folder of quantized files holds, beyond the files."""

    weights: int
    """Numbers that the model is made of, whatever each of them takes."""
    tensor_types: Mapping[str, int]
    """Number format → tensors in it."""
    fallbacks: Mapping[str, int]
    """`Q4_K → Q5_0`: tensors that the first format can't hold."""
    tools: Mapping[str, str]
    """What made it → its version."""
    shape: ModelShape | None = None
    """What its memory follows from, where llama.cpp serves it."""
    calibration: CalibrationFacts | None = None
    ignored: tuple[str, ...] = ()
    """Modules that were left as they are."""


def weights_in(folder: Path) -> int:
    """Return the numbers that the safetensors of a folder hold."""
    return sum(prod(tensor.shape) for tensor in stored_tensors(folder))


def types_in(folder: Path) -> dict[str, int]:
    """Return the number formats of the safetensors of a folder, with how many tensors have each."""
    return dict(sorted(Counter(tensor.dtype for tensor in stored_tensors(folder)).items()))


class Quantizer(Protocol):
    """One source, ready to be made smaller by each method of its family. Work that methods share is done once."""

    def __init__(self, source: Path, scratch: Path, threads: int) -> None:
        """`source` is a Hugging Face folder; `scratch` may be written to; `threads` is how many may compute."""

    def make(self, method: QuantizationMethod, folder: Path, options: Options = PLAIN) -> Made:
        """Write the files of a method into an empty folder; equal sources and options give equal bytes.

        Raises:
            UserError: the model can't be held in this format, or the pod's memory does not suffice.
        """
