"""Which files of a model's folder hold its weights, and what their headers say. For `files`, trainer and quantizer."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError

__all__ = ["INDEX", "StoredTensor", "is_weights", "stored_tensors", "weight_files"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    """As the file has it: `BF16`, `F32`, `F8_E4M3`, …"""
    shape: tuple[int, ...]


def is_weights(name: str) -> bool:
    """Say whether a file of this name holds weights that can be loaded."""
    return name.endswith(".safetensors")


def weight_files(names: Collection[str], read_index: Callable[[], bytes], uri: str) -> set[str]:
    """Return the names of the files that a loader reads the weights from; others hold them a second time.

    Args:
        names: of all files directly in the folder.
        read_index: returns the content of `model.safetensors.index.json`.
        uri: the folder, for messages.

    Raises:
        UserError: the index can't be read, or names a file that isn't there.
    """
    found = {name for name in names if is_weights(name)}
    if SINGLE in found:  # a loader takes it even where there is an index
        return {SINGLE}
    if INDEX not in names:
        return found
    try:
        wanted = set(json.loads(read_index())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{uri}: {INDEX} is no index of weights ({error}); upload the model again"
        raise UserError(Reason.MODEL_INVALID, message) from error
    if missing := sorted(wanted - found):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        message = f"{uri}: {INDEX} names {', '.join(missing[:3])}{more}, not there; upload the missing files"
        raise UserError(Reason.MODEL_INVALID, message)
    return wanted


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Return all tensors of the safetensors files in a folder, from their headers.

    A file begins with the length of a JSON header (little-endian, 8 bytes) and that header.
    """
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                found.append(StoredTensor(name, entry["dtype"], tuple(entry["shape"])))
    return found
