"""Rows of unequal length → rectangular tensors on the device. Called by `collate` of every task that reads text.

Padding is always on the right: causal models then see the same positions with and without it, and encoders don't care.
What is padded never counts: the attention mask says so to the model, IGNORE to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tunesmith_trainer.tasks.base import Example

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["indices_of", "length_mask", "pad", "pad_rows", "stack", "text_inputs"]


def pad_rows(
    rows: Sequence[Sequence[int] | Sequence[float] | NDArray[Any]], value: float, device: torch.device | None = None
) -> torch.Tensor:
    """Pad rows of numbers on the right with `value`, to the longest of them. Without a device they stay on the CPU.

    Returns:
        [rows, longest], int64; float32 if any of the numbers (or `value`) is no integer.
    """
    import numpy as np

    arrays = [np.asarray(row) for row in rows]
    whole = isinstance(value, int) and all(array.dtype.kind in "iub" for array in arrays if array.size)
    longest = max((array.size for array in arrays), default=0)
    padded = np.full((len(arrays), longest), value, dtype=np.int64 if whole else np.float32)
    for number, array in enumerate(arrays):
        padded[number, : array.size] = array
    return _move(padded, device)


def pad(examples: Sequence[Example], name: str, value: float, device: torch.device) -> torch.Tensor:
    """Pad the feature `name` (a list of numbers) of all examples. Returns [examples, longest], as `pad_rows` does."""
    return pad_rows([example.features[name] for example in examples], value, device)


def stack(examples: Sequence[Example], name: str, device: torch.device) -> torch.Tensor:
    """Put the feature `name`, which has the same shape in all examples (or is one number), into one tensor.

    Returns:
        [examples, *shape of the feature], int64 for integers, float32 for all others.
    """
    import numpy as np

    stacked = np.asarray([example.features[name] for example in examples])
    return _move(stacked.astype(np.int64 if stacked.dtype.kind in "iub" else np.float32), device)


def length_mask(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the attention mask of rows padded on the right: [rows, longest], int64, 1 where a row has something."""
    import numpy as np

    columns = np.arange(max(lengths, default=0))
    return _move((columns[None, :] < np.asarray(lengths)[:, None]).astype(np.int64), device)


def text_inputs(examples: Sequence[Example], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Pad `input_ids` (and `token_type_ids`, where the tokenizer makes them) and add their `attention_mask`."""
    inputs = {
        "input_ids": pad(examples, "input_ids", pad_id, device),
        "attention_mask": length_mask([len(example.features["input_ids"]) for example in examples], device),
    }
    if "token_type_ids" in examples[0].features:
        inputs["token_type_ids"] = pad(examples, "token_type_ids", 0, device)
    return inputs


def _move(array: Any, device: torch.device | None) -> torch.Tensor:
    import torch

    tensor = torch.from_numpy(array)
    if device is None:
        return tensor
    if device.type == "cuda":
        # from pinned memory the copy runs beside the computation
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def indices_of(examples: Sequence[Example]) -> list[int]:
    """Return the places of examples in their set, where `evaluate` has noted them; -1 elsewhere."""
    return [int(example.features.get("index", -1)) for example in examples]
