"""The work of every server in the comparison: SmolLM2-135M as Q8_0, and real tweets to ask about."""

from __future__ import annotations

import os
from pathlib import Path

import assets
from bench.serving.clients import Message
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.artifact import MODEL_FILE
from tunesmith_server.quantizers import quantizer_of

__all__ = ["Prompts", "model_file"]

METHOD = QuantizationMethod.Q8_0


def model_file() -> Path:
    """The quantized model, as a quantize Job makes it; made once."""
    cache = Path(os.environ.get("TUNESMITH_CACHE") or Path.home() / ".cache" / "tunesmith") / "bench"
    folder = cache / f"smollm2-{METHOD.value.lower()}"
    if not (folder / MODEL_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = cache / f"quantizer-{os.getpid()}"
        scratch.mkdir()
        made = quantizer_of(EngineType.LLAMA_CPP, METHOD)(assets.smollm2(), scratch, len(os.sched_getaffinity(0)))
        made.make(METHOD, scratch)
        (scratch / MODEL_FILE).rename(folder / MODEL_FILE)
        for left in scratch.iterdir():
            left.unlink()
        scratch.rmdir()
    return folder / MODEL_FILE


class Prompts:
    """Questions about tweets, none of them twice."""

    def __init__(self) -> None:
        rows, _ = assets.labelled(12_000, 0)
        self._texts = iter([row["text"] for row in rows])

    def take(self, count: int) -> list[list[Message]]:
        """The next so many."""
        return [assets.question(next(self._texts)) for _ in range(count)]
