"""Turns a Hugging Face folder into one GGUF file. Called by `quantize`, and by whoever compares engines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_store.errors import UserError

__all__ = ["to_gguf"]

OUTTYPES = {QuantizationMethod.NONE: "f16", QuantizationMethod.Q8_0: "q8_0"}
OUT_OF_MEMORY_STATUS = -9


def to_gguf(folder: Path, output: Path, quantization: QuantizationMethod) -> None:
    """Convert the safetensors, tokenizer and chat template in `folder` to `output`.

    The converter runs in a process of its own: it needs the whole model in memory, and its failure must not be ours.

    Raises:
        UserError: the model's architecture or files can't be converted, or the pod's memory does not suffice.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tunesmith_server.converter", str(folder), "--outfile", str(output)]
    done = subprocess.run(
        [*command, "--outtype", OUTTYPES[quantization]], capture_output=True, text=True, check=False, errors="replace"
    )
    if done.returncode == 0 and output.is_file():
        return
    output.unlink(missing_ok=True)
    if done.returncode == OUT_OF_MEMORY_STATUS:
        message = (
            f"quantizing {quantization} ran out of memory: raise spec.resources.memory above the size of the model"
        )
        raise UserError(Reason.OUT_OF_MEMORY, message, ExitCode.OUT_OF_MEMORY)
    complaint = [line for line in done.stderr.splitlines() if line.strip()][-3:]
    message = f"the model can't be converted to GGUF: {' / '.join(complaint) or f'exit status {done.returncode}'}"
    raise UserError(Reason.MODEL_INVALID, message)
