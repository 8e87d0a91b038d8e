"""Which files of a model's folder hold its weights, and what their headers say. For `files`, trainer and quantizer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from tunesmith_api.keys import Reason
from tunesmith_api.memory.headers import StoredTensor, loaded_files, read_header
from tunesmith_store.errors import UserError

__all__ = ["stored_tensors", "weight_files"]


def weight_files(names: Collection[str], read_index: Callable[[], bytes], uri: str) -> set[str]:
    """Return the names of the files that a loader reads the weights from; others hold them a second time.

    Args:
        names: of all files directly in the folder.
        read_index: returns the content of `model.safetensors.index.json`.
        uri: the folder, for messages.

    Raises:
        UserError: the index can't be read, or names a file that isn't there.
    """
    try:
        return loaded_files(names, read_index)
    except ValueError as error:
        raise UserError(Reason.MODEL_INVALID, f"{uri}: {error}") from error


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Return all tensors of the safetensors files in a folder, from their headers."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found += read_header(file)
    return found
