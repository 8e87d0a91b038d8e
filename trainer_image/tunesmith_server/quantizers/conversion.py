"""Turns a Hugging Face folder into one GGUF file with the weights as they are. Called by `gguf_files`.

What is known to go wrong is looked for before the conversion, and told in words with what to do.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_server.quantizers.converter import json_of
from tunesmith_store.errors import UserError
from tunesmith_store.weights import stored_tensors

__all__ = ["DISK_FULL", "to_gguf"]

KILLED = -9
OUT_OF_MEMORY = re.compile(r"MemoryError|can't allocate memory|Cannot allocate memory")
DISK_FULL = "the node's disk is full: quantizing needs room for the model three times (as it is, converted, quantized)"
OTHER = "Choose another model, or load this one with transformers."
KNOWN = (
    (
        re.compile(r"BPE pre-tokenizer was not recognized"),
        "llama.cpp doesn't know how this tokenizer cuts text into words (its pre-tokenizer), so every answer would be "
        "wrong. Use the tokenizer of the base model unchanged: adding tokens is fine, training it anew is not",
    ),
    (
        re.compile(r"(?:Model (\S+) is not supported|Architecture '(\S+)' not supported)"),
        "llama.cpp's converter doesn't know the architecture {0}",
    ),
    (re.compile(r"assert max\(.*\) < vocab_size"), "the tokenizer has more tokens than the model has embeddings"),
)


def to_gguf(folder: Path, output: Path) -> None:
    """Convert the safetensors, tokenizer and chat template in `folder` to `output`; no weight is rounded.

    The converter runs in a process of its own: it needs much memory, and its failure must not be ours.

    Raises:
        UserError: the model's architecture or files can't be converted, or the pod's memory does not suffice.
    """
    check_tokenizer(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tunesmith_server.quantizers.converter", str(folder), "--outfile", str(output)]
    done = subprocess.run(
        [*command, "--outtype", outtype(folder)],
        # some of its modules would run a model's own code from the Hub
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        errors="replace",
    )
    if done.returncode == 0 and output.is_file():
        return
    output.unlink(missing_ok=True)
    raise _refusal(done.returncode, done.stderr)


def outtype(folder: Path) -> str:
    """Return the converter's name for the number format that most of the weights have.

    bfloat16 goes up to 3e38 and float16 to 65504: the one must not become the other. What is stored in fewer bits than
    16 is unpacked to bfloat16.
    """
    weights: Counter[str] = Counter()
    for tensor in stored_tensors(folder):
        if len(tensor.shape) > 1:
            weights[tensor.dtype] += prod(tensor.shape)
    most = max(weights, key=lambda dtype: weights[dtype], default="BF16")
    return {"F32": "f32", "F64": "f32", "F16": "f16"}.get(most, "bf16")


def check_tokenizer(folder: Path) -> None:
    """Check that every token has an embedding.

    Raises:
        UserError: some have none.
    """
    config, tokenizer = json_of(folder / "config.json"), json_of(folder / "tokenizer.json")
    inner = config.get("text_config") or config
    rows = inner.get("vocab_size") if isinstance(inner, dict) else None
    if not isinstance(rows, int) or not tokenizer or (folder / "tokenizer.model").exists():
        return  # with tokenizer.model, the converter leaves out what is too much
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [token["id"] for token in tokenizer.get("added_tokens") or () if isinstance(token.get("id"), int)]
    highest = max(ids, default=-1)
    if highest >= rows:
        message = (
            f"the tokenizer has {highest + 1} tokens, the model embeddings for {rows} of them (vocab_size of "
            f"config.json). Make them more before you save it (model.resize_token_embeddings({highest + 1})), or "
            "take the tokenizer that it was trained with."
        )
        raise UserError(Reason.MODEL_INVALID, message)


def _refusal(status: int, log: str) -> UserError:
    if status == KILLED or OUT_OF_MEMORY.search(log):
        message = "converting the model ran out of memory: raise spec.resources.memory above the size of the model"
        return UserError(Reason.OUT_OF_MEMORY, message, ExitCode.OUT_OF_MEMORY)
    if "No space left on device" in log:
        return UserError(Reason.DISK_FULL, DISK_FULL, ExitCode.STORAGE_DENIED)
    for pattern, words in KNOWN:
        if found := pattern.search(log):
            named = next((group for group in found.groups() if group), "")
            what = words.format(named)
            return UserError(Reason.MODEL_INVALID, f"the model can't be converted to GGUF: {what}. {OTHER}")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit status {status}"
    if last in {"AssertionError", "AssertionError:"} and len(lines) > 1:
        last = f"{lines[-2]} does not hold"
    message = (
        f"the model can't be converted to GGUF: llama.cpp's converter ends with {last!r}. Check that config.json, "
        f"tokenizer and weights are of one model. {OTHER}"
    )
    return UserError(Reason.MODEL_INVALID, message)
