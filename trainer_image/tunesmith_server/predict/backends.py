"""Runs a model on a batch: by transformers from safetensors, or by ONNX Runtime from model.onnx.

Used by `classify`, `embeddings` and `images`; `generate` takes the loaded model itself.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith_api.keys import Reason
from tunesmith_server.predict.kinds import AUTO_CLASSES, ONNX_FILE, ModelKind
from tunesmith_server.predict.texts import Encoded
from tunesmith_store import pretrained
from tunesmith_store.errors import UserError
from tunesmith_store.weights import stored_tensors

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["Arrays", "Forward", "compute_dtype", "load_forward", "load_model", "padded"]

log = logging.getLogger("tunesmith.server")

Arrays = Mapping[str, "NDArray[Any]"]
Forward = Callable[[Arrays], "NDArray[np.float32]"]
"""Inputs of a batch → its outputs: logits, or the last hidden state of an encoder. All are finite numbers."""

# transformers imports torchao, which tells everybody of CUDA extensions that it couldn't load, and of its own enums
for _logger in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_logger).setLevel(logging.ERROR)


def padded(batch: Sequence[Encoded], padding: int) -> dict[str, NDArray[Any]]:
    """Return the batch as arrays [inputs, longest], padded on the right, with the attention mask that says so."""
    longest = max(item.length for item in batch)
    values = {"input_ids": padding}
    arrays = {
        name: np.full((len(batch), longest), values.get(name, 0), np.int64)
        for name in (*batch[0].features, "attention_mask")
    }
    for row, item in enumerate(batch):
        for name, numbers in item.features.items():
            arrays[name][row, : item.length] = numbers
        arrays["attention_mask"][row, : item.length] = 1
    return arrays


def load_forward(folder: Path, kind: ModelKind, threads: int) -> Forward:
    """Load what the folder holds.

    Raises:
        UserError: it can't be loaded.
    """
    if (folder / ONNX_FILE).is_file():
        forward = _onnx_forward(folder / ONNX_FILE, threads)
    else:
        forward = _torch_forward(load_model(folder, kind, threads), kind)

    def checked(arrays: Arrays) -> NDArray[np.float32]:
        found = forward(arrays)
        if not np.isfinite(found).all():
            raise FloatingPointError("the model's outputs are not finite: its weights are damaged")
        return found

    return checked


def load_model(folder: Path, kind: ModelKind, threads: int) -> Any:
    """Load the folder's safetensors by transformers, to compute in the number format that the machine has kernels for.

    Raises:
        UserError: they can't be loaded.
    """
    import torch
    import transformers

    torch.set_num_threads(threads)
    stored = stored_dtype(folder)
    used = compute_dtype(stored)
    auto_class = getattr(transformers, AUTO_CLASSES[kind])
    model, found = pretrained.load_model(auto_class, folder, "the model can't be loaded by transformers", dtype=used)
    missing = [name for name in found["missing_keys"] if not name.startswith("pooler.")]
    if missing or found.get("mismatched_keys"):
        names = ", ".join([*missing, *(str(name) for name, *_ in found.get("mismatched_keys", ()))][:5])
        message = f"the model's safetensors lack weights that its config.json asks for, or have others: {names}"
        raise UserError(Reason.MODEL_INVALID, message)
    why = "" if used == stored else f": this CPU has no kernels for {_name(stored)}, as which they are stored"
    log.info("weights are computed with as %s%s", _name(used), why)
    return model.eval()


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the number format of most of the folder's weights."""
    import torch

    sizes: Counter[torch.dtype] = Counter()
    for tensor in stored_tensors(folder):
        sizes[getattr(torch, _SAFETENSORS.get(tensor.dtype, "float32"))] += prod(tensor.shape)
    return max(sizes, key=lambda it: sizes[it], default=torch.float32)


_SAFETENSORS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """Return the format to compute in: the stored one where this CPU has kernels, else 32 bits, which hold it."""
    import torch

    kernels = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return stored if stored in kernels and kernels[stored]() else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _torch_forward(model: Any, kind: ModelKind) -> Forward:
    import torch

    output = "last_hidden_state" if kind is ModelKind.ENCODER else "logits"

    def forward(arrays: Arrays) -> NDArray[np.float32]:
        tensors = {
            name: torch.from_numpy(values).to(model.dtype) if values.dtype == np.float32 else torch.from_numpy(values)
            for name, values in arrays.items()
        }
        with torch.inference_mode():
            found: NDArray[np.float32] = getattr(model(**tensors), output).float().numpy()
        return found

    return forward


def _onnx_forward(path: Path, threads: int) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # between two requests its threads would else turn in a loop and take the cores from the tokenizer
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own class of errors for each kind of damage
        raise UserError(Reason.MODEL_INVALID, f"ONNX Runtime can't load {path.name}: {error}") from error
    names = {it.name for it in session.get_inputs()}
    (output,) = (it.name for it in session.get_outputs())

    def forward(arrays: Arrays) -> NDArray[np.float32]:
        (found,) = session.run([output], {name: values for name, values in arrays.items() if name in names})
        return np.asarray(found, np.float32)

    return forward
